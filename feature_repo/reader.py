"""What a ranker calls: user ids in, a dense batch of caches out, in one read of the store."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from msgspec.structs import replace

from feature_repo.store import RowStore
from models.attention import CacheBatch
from models.cache import Cache
from models.checkpoint import Checkpoint
from models.errors import ForeignRowError, MismatchError, WireError
from models.item_table import UNKNOWN
from models.row import Fold, Row, RowBytes, decode_row, whole_cache

ABSENT, DAMAGED, FOREIGN = "absent", "damaged", "foreign"


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """The caches in the order asked for, and why some users have none: "absent", "damaged" or "foreign".

    unknown_items counts recent events whose item the reader's table does not hold yet; they were read as the unknown
    item. Open the checkpoint again when it grows.
    """

    caches: CacheBatch
    missing: dict[str, str]
    unknown_items: int

    @property
    def missing_counts(self) -> Counter[str]:
        """Users without a cache, by reason."""
        return Counter(self.missing.values())


@dataclass(frozen=True, slots=True)
class Reader:
    """Reads the caches of one checkpoint. Safe to share between threads.

    Raises MismatchError when `fold` was made from another checkpoint.
    """

    rows: RowStore
    checkpoint: Checkpoint
    fold: Fold

    def __post_init__(self) -> None:
        if self.fold.spec.checkpoint_id != self.checkpoint.checkpoint_id:
            raise MismatchError(
                f"the fold belongs to checkpoint {self.fold.spec.checkpoint_id}, not {self.checkpoint.checkpoint_id}"
            )

    def read(self, user_ids: Sequence[str]) -> Read:
        """The caches of these users, recent events folded in; one bad row does not disturb the others."""
        rows, missing = self.read_rows(user_ids)
        unknown_items = 0
        caches: list[Cache | None] = [None] * len(rows)
        for b, row in enumerate(rows):
            if row is None:
                continue
            readable, unknown = self._within_table(row)
            try:
                caches[b] = whole_cache(readable, self.fold)
            except WireError:
                missing[user_ids[b]] = DAMAGED
                continue
            unknown_items += unknown
        return Read(caches=CacheBatch.of(self.fold.spec, caches), missing=missing, unknown_items=unknown_items)

    def read_rows(self, user_ids: Sequence[str]) -> tuple[list[Row | None], dict[str, str]]:
        """The rows as stored (folded part and recent events), and the reason for each user who has none."""
        rows: list[Row | None] = []
        missing: dict[str, str] = {}
        stored = self.rows.get_rows(self.checkpoint.checkpoint_id, user_ids)
        for user_id, data in zip(user_ids, stored, strict=True):
            row, reason = self._decode(data)
            rows.append(row)
            if reason is not None:
                missing[user_id] = reason
        return rows, missing

    def _decode(self, data: RowBytes | None) -> tuple[Row | None, str | None]:
        if data is None:
            return None, ABSENT
        try:
            return decode_row(data, self.fold.spec), None
        except ForeignRowError:
            return None, FOREIGN
        except WireError:
            return None, DAMAGED

    def _within_table(self, row: Row) -> tuple[Row, int]:
        """The writer's item table may have grown since this one was loaded."""
        beyond_N = row.recent["item"] >= len(self.fold.table)
        if not beyond_N.any():
            return row, 0
        recent = row.recent.copy()
        recent["item"][beyond_N] = UNKNOWN
        return replace(row, recent_data=recent.tobytes()), int(np.count_nonzero(beyond_N))
