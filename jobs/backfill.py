"""`vql backfill`: the rows of every user at a cut of the log, by the very fold that the stream uses.

One shuffle by user, sorted by offset within; then a single pass per task folds user after user, so a user of a
million events needs no more memory than one of ten. Executors write through the store's fence. Nothing is lost by
a kill: rows that are there already are refused as not newer, and the record that lets a stream start is written
last. The stream of the checkpoint then starts at the cut: no gap, no overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pyarrow as pa
from msgspec.structs import replace
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from feature_repo.handle import StoreHandle
from feature_repo.store import Backfill, RowPut, bind_topic, whole_put
from jobs.event_log import LogFacts, log_facts, read_records
from jobs.spark import errors_of_workers
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import InputError, StoreError
from models.event import runs
from models.row import Row, advance, new_row
from models.wire import pack_recent

PUT_CHUNK = 500
# What `fold_users` takes of a record. The hash is that of models.event.hash_event_id, which is the common CRC-32.
FOLDED = (
    *("user_id", "item_id", "action", "event_time_ms", "weight", "partition", "offset"),
    "crc32(cast(event_id as binary)) AS event_hash",
)
DONE = "users long, events long, newer long"


@errors_of_workers()
def backfill(
    spark: SparkSession, checkpoint: Checkpoint, log: Path, store: StoreHandle, cut: Mapping[int, int] | None = None
) -> Backfill:
    """Write the rows and record the cut (None: the log's end as of now).

    Raises InputError for an empty log or a cut beyond it, StoreError when the rows do not add up to the log.
    """
    events = read_records(spark, log)
    facts = log_facts(spark, log / "events")
    rows = store.open()
    revision = _next_revision(rows.backfill(checkpoint.checkpoint_id), facts)
    cut = _resolve_cut(events, cut)
    if facts.topic_id is not None:
        bind_topic(rows, checkpoint.checkpoint_id, facts.epoch, facts.topic_id, facts.partitions)
    until = F.create_map(*(F.lit(x) for pair in cut.items() for x in pair))[F.col("partition")]
    wanted = events.where(F.col("offset") <= until).selectExpr(*FOLDED)
    by_user = wanted.repartition("user_id").sortWithinPartitions("user_id", "offset")
    checkpoint.fold()  # refuse a missing item table here rather than on an executor
    done = by_user.mapInArrow(_folder(checkpoint, store, (facts.epoch, revision)), DONE)
    total = done.agg(*(F.sum(name).alias(name) for name in ("users", "events", "newer"))).collect()[0]
    expected = sum(offset + 1 for offset in cut.values()) if facts.dense else wanted.count()
    if total["events"] != expected:
        raise StoreError(
            f"the backfill folded {total['events']} of {expected} events; the log changed under it: run it again"
        )
    held = rows.count_rows(checkpoint.checkpoint_id)
    if held < total["users"]:
        raise StoreError(
            f"{total['users']} rows were written, but the store here holds {held}; do the executors reach the same one?"
        )
    record = Backfill(
        epoch=facts.epoch,
        cut=dict(cut),
        users=total["users"],
        events=total["events"],
        newer=total["newer"],
        log=str(log),
        log_id=facts.log_id,
        revision=revision,
    )
    rows.record_backfill(checkpoint.checkpoint_id, record)
    return record


def _next_revision(before: Backfill | None, facts: LogFacts) -> int:
    """0, or one more than the last backfill's: rows at the same offset are then replaced, and so repaired."""
    if before is None or before.epoch < facts.epoch:
        return 0
    if before.epoch > facts.epoch or before.log_id != facts.log_id:
        raise StoreError(
            f"the rows of this checkpoint come from log {before.log} of epoch {before.epoch}, not from this one of "
            f"epoch {facts.epoch}: their offsets do not compare; ingest the new log with --epoch {before.epoch + 1}"
        )
    return before.revision + 1


def _resolve_cut(events: DataFrame, cut: Mapping[int, int] | None) -> dict[int, int]:
    """The cut for every partition that holds events."""
    ends = {row[0]: row[1] for row in events.groupBy("partition").agg(F.max("offset")).collect()}
    if not ends:
        raise InputError("the log is empty: there is nothing to backfill; run vql ingest first")
    if cut is None:
        return dict(sorted(ends.items()))
    beyond = {p: o for p, o in cut.items() if not -1 <= o <= ends.get(p, -1)}
    if beyond:
        raise InputError(f"the cut {beyond} lies beyond the log, which ends at {dict(sorted(ends.items()))}")
    return {p: cut.get(p, -1) for p in sorted(ends)}


def _folder(
    checkpoint: Checkpoint, store: StoreHandle, epoch_and_revision: tuple[int, int]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    path, checkpoint_id = checkpoint.path, checkpoint.checkpoint_id

    def fold_task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        opened = open_checkpoint(path)
        rows = store.open()
        users = events = newer = 0
        chunk: list[RowPut] = []

        def counted() -> Iterator[pa.RecordBatch]:
            nonlocal events
            for batch in batches:
                events += batch.num_rows
                yield batch

        for user_id, row in fold_users(counted(), opened, *epoch_and_revision):
            users += 1
            chunk.append(whole_put(user_id, row))
            if len(chunk) == PUT_CHUNK:
                newer += rows.put_rows(checkpoint_id, chunk).count(False)
                chunk = []
        newer += rows.put_rows(checkpoint_id, chunk).count(False)
        yield pa.record_batch({"users": [users], "events": [events], "newer": [newer]})

    return fold_task


def fold_users(
    batches: Iterator[pa.RecordBatch], checkpoint: Checkpoint, epoch: int, revision: int = 0
) -> Iterator[tuple[str, Row]]:
    """Events sorted by (user, offset) to each user's row, holding one user at a time.

    A tombstone is a row of nulls: it becomes a record of weight 0, and erases what came before.
    """
    using = checkpoint.fold()
    current: str | None = None
    row: Row | None = None
    for batch in batches:
        recent = pack_recent(
            batch["offset"].to_numpy(),
            batch["event_time_ms"].fill_null(0).to_numpy(),
            checkpoint.action_index(batch["action"].to_pylist()),
            using.table.lookup(batch["item_id"].to_pylist()),
            batch["weight"].fill_null(0.0).to_numpy(),
            batch["event_hash"].fill_null(0).to_numpy(),
        )
        partition_N = batch["partition"].to_numpy()
        users = batch["user_id"].dictionary_encode()
        code_N = users.indices.to_numpy()
        for start, end in runs(code_N):
            user_id = users.dictionary[code_N[start]].as_py()
            if row is None or user_id != current:
                if row is not None and current is not None:
                    yield current, row
                current, row = user_id, new_row(using.spec, epoch, int(partition_N[start]), revision)
            row, _ = advance(row, recent[start:end], replace(row.stamp, offset=-1), using)
    if row is not None and current is not None:
        yield current, row
