"""The reader's plain twin: decode and fold one row after another, in the order in which one would write it first."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from msgspec.structs import replace

from models.attention import CacheBatch
from models.cache import Cache
from models.errors import ForeignRowError, WireError
from models.item_table import UNKNOWN
from models.row import Fold, Row, RowBytes, decode_row, whole_cache


def read_plainly(
    user_ids: Sequence[str], rows: Sequence[RowBytes | None], using: Fold
) -> tuple[CacheBatch, dict[str, str], int]:
    """The caches, why some users have none, and how many recent events have an item beyond the table."""
    caches: list[Cache | None] = []
    missing: dict[str, str] = {}
    unknown_items = 0
    for user_id, data in zip(user_ids, rows, strict=True):
        cache = None
        if data is None:
            missing[user_id] = "absent"
        else:
            try:
                row, unknown = _within_table(decode_row(data, using.spec), using)
                cache = whole_cache(row, using)
                unknown_items += unknown
            except ForeignRowError:
                missing[user_id] = "foreign"
            except WireError:
                missing[user_id] = "damaged"
        caches.append(cache)
    return CacheBatch.of(using.spec, caches), missing, unknown_items


def _within_table(row: Row, using: Fold) -> tuple[Row, int]:
    beyond_N = row.recent["item"] >= len(using.table)
    recent = row.recent.copy()
    recent["item"][beyond_N] = UNKNOWN
    return replace(row, recent_data=recent.tobytes()), int(np.count_nonzero(beyond_N))
