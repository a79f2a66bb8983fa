"""`vql backfill`: the rows of every user at a cut of the log, by the very fold that the stream uses.

One shuffle by user, sorted by offset within; then each task folds its users in one pass (`jobs.backfill_task`), and
puts their rows through the store's fence at a paced rate. Nothing is lost by a kill: rows that are there already are
not put again, and the record that lets a stream start is written last. The stream of the checkpoint then starts at the
cut: no gap, no overlap.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import ceil
from pathlib import Path

import pyarrow as pa
from pyspark import Accumulator
from pyspark.sql import DataFrame, Row, SparkSession
from pyspark.sql import functions as F

from feature_repo.handle import StoreHandle
from feature_repo.store import Backfill, bind_topic
from jobs.backfill_progress import progress_shown
from jobs.backfill_task import RowTask, write_rows
from jobs.event_log import (
    LogFacts,
    forgotten_here,
    forgotten_of,
    log_facts,
    read_records,
    tombstones,
    without_forgotten,
)
from jobs.spark import errors_of_workers
from models.checkpoint import Checkpoint
from models.errors import InputError, StoreError
from models.forgotten import Request

# What a fold takes of a record. The hash is that of models.event.hash_event_id, which is the common CRC-32.
FOLDED = (
    *("user_id", "item_id", "action", "event_time_ms", "weight", "partition", "offset"),
    "crc32(cast(event_id as binary)) AS event_hash",
)
# Rows of the whole job. A put takes Redis some 0.1 ms, so most of its time stays with the stream and the rankers.
PUTS_PER_S = 2_000.0
# Small enough to be sorted in memory, to be done again after a fault, and to show progress.
EVENTS_PER_TASK = 500_000
DONE = "users long, events long, newer long"


@errors_of_workers()
def backfill(
    spark: SparkSession,
    checkpoint: Checkpoint,
    log: Path,
    store: StoreHandle,
    cut: Mapping[int, int] | None = None,
    puts_per_s: float = PUTS_PER_S,
) -> Backfill:
    """Write the rows and record the cut (None: the log's end as of now).

    puts_per_s: rows of all tasks together, 0 for no limit. It is divided by the cores that the job has when it begins.
    Raises InputError for an empty log or a cut beyond it, StoreError when the rows do not add up to the log.
    """
    records = read_records(spark, log)
    gone = forgotten_here(records, forgotten_of(log))
    facts = log_facts(spark, log / "events")
    rows = store.open()
    revision = _next_revision(rows.backfill(checkpoint.checkpoint_id), facts)
    cut = _resolve_cut(records, cut)
    if facts.topic_id is not None:
        bind_topic(rows, checkpoint.checkpoint_id, facts.epoch, facts.topic_id, facts.partitions)
    task = row_task(checkpoint, store, (facts.epoch, revision), puts_per_s / spark.sparkContext.defaultParallelism)
    wanted = events_up_to(_standing(records, gone, facts.epoch), cut)
    expected = sum(offset + 1 for offset in cut.values()) if facts.dense and not gone else wanted.count()
    tasks = max(spark.sparkContext.defaultParallelism, ceil(expected / EVENTS_PER_TASK))
    total = write_all(wanted, task, tasks, expected)
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


def _standing(records: DataFrame, gone: Mapping[str, Sequence[Request]], epoch: int) -> DataFrame:
    """Without the forgotten. The row of one who came back begins where the request is, as the stream's does."""
    standing = without_forgotten(records, gone)
    if not gone:
        return standing
    back = standing.where(F.col("user_id").isin(list(gone))).select("user_id").distinct().collect()
    begun = tombstones(records.sparkSession, {user_id: gone[user_id] for (user_id,) in back}, epoch)
    return standing.unionByName(begun)


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


def events_up_to(events: DataFrame, cut: Mapping[int, int]) -> DataFrame:
    """What a fold needs of the records at or below the cut."""
    until = F.create_map(*(F.lit(x) for pair in cut.items() for x in pair))[F.col("partition")]
    return events.where(F.col("offset") <= until).selectExpr(*FOLDED)


def row_task(checkpoint: Checkpoint, store: StoreHandle, stamped: tuple[int, int], puts_per_s: float) -> RowTask:
    """What all tasks share; stamped: the epoch and revision of the rows. A missing item table is refused here."""
    epoch, revision = stamped
    return RowTask(
        checkpoint=checkpoint.path,
        checkpoint_id=checkpoint.checkpoint_id,
        items=len(checkpoint.fold().table),
        store=store,
        epoch=epoch,
        revision=revision,
        puts_per_s=puts_per_s,
    )


def write_all(wanted: DataFrame, task: RowTask, tasks: int, expected: int) -> Row:
    """The sums of what the tasks did, with progress shown meanwhile."""
    context = wanted.sparkSession.sparkContext
    users, events = context.accumulator(0), context.accumulator(0)
    # Users' hashes nearly always differ, where their ids begin alike: it is what is compared in sorting.
    hashed = wanted.repartition(tasks, "user_id").withColumn("user_hash", F.xxhash64("user_id"))
    by_user = hashed.sortWithinPartitions("user_hash", "user_id", "offset").drop("user_hash")
    done = by_user.mapInArrow(_mapped(task, users, events), DONE)
    sums = done.agg(*(F.sum(name).alias(name) for name in ("users", "events", "newer")))
    with progress_shown(lambda: (users.value, events.value), expected):
        return sums.collect()[0]


def _mapped(
    task: RowTask, users: Accumulator[int], events: Accumulator[int]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def write(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        done = write_rows(task, batches)
        # For the eye alone: a task that is done twice counts twice.
        users.add(done.users)
        events.add(done.events)
        yield pa.record_batch({name: [count] for name, count in done._asdict().items()})

    return write
