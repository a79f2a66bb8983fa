"""The rows that a reader read last, for when the store is late, away or behind: bounded in bytes and in age."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
from cachetools import LRUCache

from models.row import RowBytes
from models.row_places import ABSENT, SOUND, stamps

# What an entry takes beside its bytes: its id, its stamp, and its places in three dictionaries.
_ENTRY_BYTES = 800


class _Kept(msgspec.Struct):
    """A sound row, the order of its stamp, and when the store last gave it."""

    row: RowBytes
    order: tuple[int, int, int]
    read_s: float


class KeptRows:
    """Rows of one checkpoint by user; beyond bytes_max the least recently used go. Safe to share between threads.

    A row is good for kept_s after the store gave it, so that one erased meanwhile is not given for longer.
    """

    def __init__(self, bytes_max: int, kept_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rows: LRUCache[str, _Kept] = LRUCache(bytes_max, getsizeof=_size_bytes)
        self._kept_s, self._clock = kept_s, clock
        self._turn = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """What the rows take, nearly."""
        return int(self._rows.currsize)

    def get(self, user_ids: Sequence[str]) -> list[RowBytes | None]:
        """The rows that are still good."""
        since_s = self._clock() - self._kept_s
        with self._turn:
            kept = [self._rows.get(user_id) for user_id in user_ids]
        return [each.row if each is not None and each.read_s >= since_s else None for each in kept]

    def renew(self, user_ids: Sequence[str], rows: Sequence[RowBytes | None], place_B: np.ndarray) -> list[int]:
        """Keep the sound rows among these that the store gave, and forget users whom it has not.

        place_B: the places of the rows (dtype PLACE). Returns which of the rows are older than those kept, and were
        left out: a store must not go back, but a failover may. When a kept row is too old itself, the store's counts.
        """
        now_s, behind = self._clock(), []
        statuses = place_B["status"].tolist()
        with self._turn:
            columns = zip(user_ids, statuses, stamps(place_B), strict=True)
            for b, (user_id, status, order) in enumerate(columns):
                kept = self._rows.get(user_id)
                if status == SOUND:
                    if kept is not None and kept.order == order:
                        kept.read_s = now_s
                    elif kept is not None and order < kept.order and now_s - kept.read_s <= self._kept_s:
                        behind.append(b)
                    else:
                        # Only now a row that lies in larger memory is copied.
                        self._put(user_id, _Kept(rows[b], order, now_s))
                elif status == ABSENT and kept is not None:
                    del self._rows[user_id]
        return behind

    def clear(self) -> None:
        """Forget all: the store is another one."""
        with self._turn:
            self._rows.clear()

    def _put(self, user_id: str, kept: _Kept) -> None:
        try:
            self._rows[user_id] = kept
        except ValueError:  # larger than all that may be kept
            self._rows.pop(user_id, None)


def _size_bytes(kept: _Kept) -> int:
    return kept.row.size_bytes + _ENTRY_BYTES
