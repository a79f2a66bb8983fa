"""`vql backfill`: the rows of every user at a cut of the log, by the very fold that the stream uses.

One shuffle by user, sorted by offset within; then a single pass per task folds user after user, so a user of a
million events needs no more memory than one of ten. Executors write through the store's fence. Nothing is lost by
a kill: rows that are there already are refused as not newer, and the record that lets a stream start is written
last. The stream of the checkpoint then starts at the cut: no gap, no overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from feature_repo.handle import StoreHandle
from feature_repo.store import Backfill, RowPut, whole_put
from jobs.ingest import log_properties
from jobs.spark import read_delta
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import InputError, StoreError
from models.row import Row, advance, new_row
from models.wire import pack_recent

PUT_CHUNK = 500
_DONE = pa.schema([("users", pa.int64()), ("events", pa.int64())])


def backfill(
    spark: SparkSession, checkpoint: Checkpoint, log: Path, store: StoreHandle, cut: Mapping[int, int] | None = None
) -> Backfill:
    """Write the rows and record the cut (None: the log's end as of now).

    Raises InputError for an empty log or a cut beyond it, StoreError when the rows do not add up to the log.
    """
    events = read_delta(spark, log / "events")
    epoch, _ = log_properties(spark, log / "events")
    cut = _resolve_cut(events, cut)
    until = F.create_map(*(F.lit(x) for pair in cut.items() for x in pair))[F.col("partition")]
    wanted = events.where(F.col("offset") <= until).select(
        *("user_id", "item_id", "action", "event_time_ms", "weight", "partition", "offset"),
        # The hash of models.event.hash_event_id, which is the common CRC-32.
        F.crc32(F.col("event_id").cast("binary")).alias("event_hash"),
    )
    by_user = wanted.repartition("user_id").sortWithinPartitions("user_id", "offset")
    checkpoint.fold()  # refuse a missing item table here rather than on an executor
    done = by_user.mapInArrow(_folder(checkpoint, store, epoch), "users long, events long")
    total = done.agg(F.sum("users").alias("users"), F.sum("events").alias("events")).collect()[0]
    expected = sum(offset + 1 for offset in cut.values())
    if total["events"] != expected:
        raise StoreError(
            f"the backfill folded {total['events']} of {expected} events; the log changed under it: run it again"
        )
    record = Backfill(epoch=epoch, cut=dict(cut), users=total["users"], events=total["events"], log=str(log))
    store.open().record_backfill(checkpoint.checkpoint_id, record)
    return record


def _resolve_cut(events: DataFrame, cut: Mapping[int, int] | None) -> dict[int, int]:
    """The cut for every partition that holds events."""
    ends = {row[0]: row[1] for row in events.groupBy("partition").agg(F.max("offset")).collect()}
    if not ends:
        raise InputError("the log is empty: there is nothing to backfill; run vql ingest first")
    if cut is None:
        return dict(sorted(ends.items()))
    beyond = {p: o for p, o in cut.items() if o > ends.get(p, -1)}
    if beyond:
        raise InputError(f"the cut {beyond} lies beyond the log, which ends at {ends}")
    return {p: cut.get(p, -1) for p in sorted(ends)}


def _folder(
    checkpoint: Checkpoint, store: StoreHandle, epoch: int
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    path, checkpoint_id = checkpoint.path, checkpoint.checkpoint_id

    def fold_task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        opened = open_checkpoint(path)
        rows = store.open()
        users = events = 0
        chunk: list[RowPut] = []
        for user_id, row in fold_users(batches, opened, epoch):
            users, events = users + 1, events + row.count
            chunk.append(whole_put(user_id, row))
            if len(chunk) == PUT_CHUNK:
                rows.put_rows(checkpoint_id, chunk)
                chunk = []
        if chunk:
            rows.put_rows(checkpoint_id, chunk)
        yield pa.record_batch({"users": [users], "events": [events]}, schema=_DONE)

    return fold_task


def fold_users(batches: Iterator[pa.RecordBatch], checkpoint: Checkpoint, epoch: int) -> Iterator[tuple[str, Row]]:
    """Events sorted by (user, offset) to each user's row, holding one user at a time."""
    using = checkpoint.fold()
    current: str | None = None
    row: Row | None = None
    for batch in batches:
        recent = pack_recent(
            batch["offset"].to_numpy(),
            batch["event_time_ms"].to_numpy(),
            checkpoint.action_index(batch["action"].to_pylist()),
            using.table.lookup(batch["item_id"].to_pylist()),
            batch["weight"].to_numpy(),
            batch["event_hash"].to_numpy(),
        )
        partition_N = batch["partition"].to_numpy()
        users = batch["user_id"].dictionary_encode()
        code_N = users.indices.to_numpy()
        starts = np.flatnonzero(np.r_[True, np.diff(code_N) != 0]) if len(code_N) else []
        for start, end in zip(starts, [*starts[1:], len(code_N)], strict=True):
            user_id = users.dictionary[code_N[start]].as_py()
            if row is None or user_id != current:
                if row is not None and current is not None:
                    yield current, row
                current, row = user_id, new_row(using.spec, epoch, int(partition_N[start]))
            row, _ = advance(row, recent[start:end], replace(row.stamp, offset=-1), using)
    if row is not None and current is not None:
        yield current, row
