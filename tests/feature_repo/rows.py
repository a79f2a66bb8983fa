"""Real rows of the small checkpoint, and the puts that write them."""

from __future__ import annotations

import numpy as np

from feature_repo.store import Backfill, RowStore, whole_put
from models.checkpoint import Checkpoint
from models.event import columns
from models.row import Fold, Row, advance, new_row
from models.wire import Stamp, pack_recent
from tests.small import random_events


def small_rows(checkpoint: Checkpoint, fold: Fold, count: int, seed: int = 0) -> dict[str, Row]:
    """A row for each of some users, from `count` random events on partition 0."""
    events = columns(random_events(count, seed=seed), range(count))
    recent = pack_recent(
        events.offset_N,
        events.time_ms_N,
        checkpoint.action_index(events.actions),
        fold.table.lookup(events.item_ids),
        events.weight_N,
        events.event_hash_N,
    )
    users = np.array(events.user_ids)
    position = Stamp(epoch=0, partition=0, offset=0)
    return {
        user_id: advance(new_row(fold.spec, 0, 0), recent[users == user_id], position, fold)[0]
        for user_id in sorted(set(events.user_ids))
    }


def put_all(store: RowStore, checkpoint: Checkpoint, rows: dict[str, Row]) -> list[bool]:
    """Write whole rows, and say that they are all."""
    puts = [whole_put(user_id, row) for user_id, row in rows.items()]
    done = store.put_rows(checkpoint.checkpoint_id, puts)
    store.record_backfill(checkpoint.checkpoint_id, Backfill(epoch=0, cut={0: 0}, users=len(rows), events=0, log="log"))
    return done
