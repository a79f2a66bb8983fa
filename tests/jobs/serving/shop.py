"""A checkpoint that scores and a store with its users' rows: what a server is tested on."""

from __future__ import annotations

import json
from collections.abc import Sequence

from feature_repo.store import RowStore, whole_put
from models.checkpoint import Checkpoint
from models.row import advance, new_row
from models.wire import Stamp
from tests.pipelines.small_log import recent_of
from tests.small import HOUR_MS, START_MS, random_events

USERS, EVENTS_EACH = 12, 30
NOW_MS = START_MS + 100 * HOUR_MS
CANDIDATES = [f"i{n}" for n in range(1, 41)] + ["nothing"]


def user_ids() -> list[str]:
    return [f"u{n}" for n in range(USERS)]


def put_rows(checkpoint: Checkpoint, rows: RowStore, users: Sequence[str] | None = None) -> None:
    """A row for each user, of events of that user's own."""
    fold = checkpoint.fold()
    for n, user_id in enumerate(users or user_ids()):
        events = random_events(EVENTS_EACH, users=1, seed=n)
        recent = recent_of(checkpoint, events, range(EVENTS_EACH))
        row, _ = advance(new_row(fold.spec, 1, 1), recent, Stamp(epoch=1, partition=1, offset=-1), fold)
        assert rows.put_rows(checkpoint.checkpoint_id, [whole_put(user_id, row)]) == [True]
    rows.commit_positions(checkpoint.checkpoint_id, 1, {1: EVENTS_EACH})


def bodies() -> list[bytes]:
    """A request for each user, with candidates enough to take their time."""
    return [request({user_id: CANDIDATES}) for user_id in user_ids()]


def request(candidates: dict[str, list[str]]) -> bytes:
    users = [{"user_id": user_id, "candidates": items} for user_id, items in candidates.items()]
    return json.dumps({"users": users, "now_ms": NOW_MS}).encode()
