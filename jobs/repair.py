"""Rows published anew from the log, where those in the store are wrong.

A row is folded from the user's first event to the log's end, and put with a revision above all that there are. So the
fence takes it in place of one at the same offset, or an older one, and never of a newer: a stream that has gone on
meanwhile, from the wrong row, is ahead of the log's copy, and its row is repaired when the copy has caught up. A stream
that keeps the wrong row in memory has its next put refused, reads the repaired row, and goes on from that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pyarrow as pa
from pyspark.sql import DataFrame
from pyspark.sql import functions as F

from feature_repo.handle import StoreHandle
from feature_repo.store import RowPut, RowStore, whole_put
from jobs.audited_log import AuditedLog
from jobs.backfill import FOLDED, fold_users
from models.checkpoint import Checkpoint, open_checkpoint

PUT_CHUNK = 500


class Repaired(msgspec.Struct, frozen=True, kw_only=True):
    """users: whose rows were wrong. rows: published anew. newer: not, because the store's row is newer than the log."""

    users: int = 0
    rows: int = 0
    newer: int = 0
    revision: int | None = None


def repair(
    log: AuditedLog, users: DataFrame, checkpoint: Checkpoint, store: StoreHandle, revision_max: int
) -> Repaired:
    """Publish the rows of these users (user_id) anew; revision_max: the highest of their rows."""
    revision = _claimed(store.open(), checkpoint.checkpoint_id, revision_max)
    events = log.records.join(users, "user_id").selectExpr(*FOLDED)
    by_user = events.repartition("user_id").sortWithinPartitions("user_id", "offset")
    task = _putter(checkpoint.path, store, (log.facts.epoch, revision))
    done = by_user.mapInArrow(task, "users long, newer long").agg(F.sum("users"), F.sum("newer")).collect()[0]
    put, newer = done[0] or 0, done[1] or 0
    return Repaired(users=put, rows=put - newer, newer=newer, revision=revision)


def _claimed(rows: RowStore, checkpoint_id: str, revision_max: int) -> int:
    """A revision that no row has, and that the next backfill will be above, as it has to be to repair in its turn."""
    record = rows.backfill(checkpoint_id)
    revision = 1 + max(revision_max, 0 if record is None else record.revision)
    if record is not None:
        rows.record_backfill(checkpoint_id, msgspec.structs.replace(record, revision=revision))
    return revision


def _putter(
    path: Path, store: StoreHandle, epoch_and_revision: tuple[int, int]
) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def put_task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        checkpoint = open_checkpoint(path)
        rows = store.open()
        users = newer = 0
        chunk: list[RowPut] = []
        for user_id, row in fold_users(batches, checkpoint, *epoch_and_revision):
            users += 1
            chunk.append(whole_put(user_id, row))
            if len(chunk) == PUT_CHUNK:
                newer += rows.put_rows(checkpoint.checkpoint_id, chunk).count(False)
                chunk = []
        newer += rows.put_rows(checkpoint.checkpoint_id, chunk).count(False)
        yield pa.record_batch({"users": [users], "newer": [newer]})

    return put_task
