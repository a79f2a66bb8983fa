"""`vql rank`: one user's candidates, scored from the row that Feast holds."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import ABSENT, FOREIGN, FRESH, Reader
from jobs.scoring import Asked, load_scorer
from models.checkpoint import open_checkpoint
from models.errors import ForeignRowError, InputError, WireError


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """Candidates with logit and whether the item table knows them, best first; the row they were read from."""

    candidates: list[tuple[str, float, bool]]
    events: int
    stamp: str


def rank_user(
    user_id: str, item_ids: Sequence[str], checkpoint_path: Path, state: Path, now_ms: int | None = None
) -> Ranked:
    """Raises InputError for no candidates or an unknown user, WireError and ForeignRowError for an unusable row."""
    if not item_ids:
        raise InputError("no candidates; give --candidates ITEM,ITEM,...")
    checkpoint = open_checkpoint(checkpoint_path)
    reader = Reader(StoreHandle(state=state).open(), Opened(checkpoint))
    using = reader.fold
    (row,), _ = reader.read_rows([user_id])
    now_ms = int(time.time() * 1000) if now_ms is None else now_ms
    (scored,) = (
        load_scorer(checkpoint, using, reader).score([Asked(user_id=user_id, item_ids=item_ids, now_ms=now_ms)]).users
    )
    if scored.history != FRESH:
        if scored.history == ABSENT:
            raise InputError(f"user {user_id!r} has no row of checkpoint {checkpoint.checkpoint_id} in {state}")
        error = ForeignRowError if scored.history == FOREIGN else WireError
        raise error(f"the row of user {user_id!r} in {state} is {scored.history}; delete it, then run vql backfill")
    assert row is not None
    order = np.argsort(-np.array(scored.scores), kind="stable")
    unknown = set(scored.unknown)
    stamp = row.stamp
    return Ranked(
        candidates=[(item_ids[c], scored.scores[c], c not in unknown) for c in order.tolist()],
        events=row.count,
        stamp=f"{stamp.epoch}:{stamp.partition}:{stamp.offset}.{stamp.revision}",
    )
