"""Rows published anew from the log, where those in the store are wrong.

A row is folded from the user's first event to the log's end, and put with a revision above all that there are. So the
fence takes it in place of one at the same offset, or an older one, and never of a newer: a stream that has gone on
meanwhile, from the wrong row, is ahead of the log's copy, and its row is repaired when the copy has caught up. A stream
that keeps the wrong row in memory has its next put refused, reads the repaired row, and goes on from that.
"""

from __future__ import annotations

import msgspec
from pyspark.sql import DataFrame

from feature_repo.handle import StoreHandle
from feature_repo.store import RowStore
from jobs.audited_log import AuditedLog
from jobs.backfill import FOLDED, PUTS_PER_S, row_task, write_all
from models.checkpoint import Checkpoint


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
    cores = events.sparkSession.sparkContext.defaultParallelism
    task = row_task(checkpoint, store, (log.facts.epoch, revision), PUTS_PER_S / cores)
    done = write_all(events, task, cores, events.count())
    put, newer = done["users"] or 0, done["newer"] or 0
    return Repaired(users=put, rows=put - newer, newer=newer, revision=revision)


def _claimed(rows: RowStore, checkpoint_id: str, revision_max: int) -> int:
    """A revision that no row has, and that the next backfill will be above, as it has to be to repair in its turn."""
    record = rows.backfill(checkpoint_id)
    revision = 1 + max(revision_max, 0 if record is None else record.revision)
    if record is not None:
        rows.record_backfill(checkpoint_id, msgspec.structs.replace(record, revision=revision))
    return revision
