"""The rows that a reader read last, for when the store is late, away or behind: bounded in bytes and in age."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from models.row import RowBytes
from models.row_places import ABSENT, SOUND, stamps

# What an entry takes beside its bytes: its id, its stamp, and its place in the dictionary.
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
        # The least recently used first. cachetools' LRUCache is written in Python, and takes several times longer.
        self._rows: OrderedDict[str, _Kept] = OrderedDict()
        self._size_bytes, self._bytes_max = 0, bytes_max
        self._kept_s, self._clock = kept_s, clock
        self._turn = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """What the rows take, nearly."""
        return self._size_bytes

    def get(self, user_ids: Sequence[str]) -> list[RowBytes | None]:
        """The rows that are still good."""
        since_s = self._clock() - self._kept_s
        with self._turn:
            kept = [self._used(user_id) for user_id in user_ids]
        return [each.row if each is not None and each.read_s >= since_s else None for each in kept]

    def renew(self, user_ids: Sequence[str], rows: Sequence[RowBytes | None], place_B: np.ndarray) -> list[int]:
        """Keep the sound rows among these that the store gave, and forget users whom it has not.

        place_B: the places of the rows (dtype PLACE). Returns which of the rows are older than those kept, and were
        left out: a store must not go back, but a failover may. When a kept row is too old itself, the store's counts.
        """
        now_s, behind = self._clock(), []
        statuses = place_B["status"].tolist()
        with self._turn:
            get, used = self._rows.get, self._rows.move_to_end
            for b, (user_id, status, order) in enumerate(zip(user_ids, statuses, stamps(place_B), strict=True)):
                kept = get(user_id)
                if kept is not None:
                    used(user_id)
                    if status == SOUND and kept.order == order:
                        # As a rule.
                        kept.read_s = now_s
                        continue
                if status == SOUND:
                    if kept is not None and order < kept.order and now_s - kept.read_s <= self._kept_s:
                        behind.append(b)
                    else:
                        # Only now a row that lies in larger memory is copied.
                        self._put(user_id, _Kept(rows[b], order, now_s))
                elif status == ABSENT:
                    self._forget(user_id)
        return behind

    def clear(self) -> None:
        """Forget all: the store is another one."""
        with self._turn:
            self._rows.clear()
            self._size_bytes = 0

    def _used(self, user_id: str) -> _Kept | None:
        kept = self._rows.get(user_id)
        if kept is not None:
            self._rows.move_to_end(user_id)
        return kept

    def _put(self, user_id: str, kept: _Kept) -> None:
        self._forget(user_id)
        size_bytes = _size_bytes(kept)
        if size_bytes > self._bytes_max:
            return
        self._rows[user_id] = kept
        self._size_bytes += size_bytes
        while self._size_bytes > self._bytes_max:
            self._size_bytes -= _size_bytes(self._rows.popitem(last=False)[1])

    def _forget(self, user_id: str) -> None:
        kept = self._rows.pop(user_id, None)
        if kept is not None:
            self._size_bytes -= _size_bytes(kept)


def _size_bytes(kept: _Kept) -> int:
    return kept.row.size_bytes + _ENTRY_BYTES
