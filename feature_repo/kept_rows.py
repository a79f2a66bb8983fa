"""The rows that a reader read last, for when the store is late, away or behind: bounded in bytes and in age.

What is compared at every read lies in one array, by slot: Python's objects are met cold at the end of a read, whose
rows have pushed them out of the core's cache.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numba
import numpy as np
from numba import f8, from_dtype, i8

from models.cache_kernels import PLACE
from models.row import RowBytes
from models.row_places import ABSENT, SOUND

# What an entry takes beside its bytes: its id, its slot, and its place in the dictionary.
_ENTRY_BYTES = 800
# A kept row: the order of its stamp, when the store last gave it, when it was used last (calls are counted), and whose
# it is: each entry has a number of its own, 0 for a free slot.
_ORDER = ("epoch", "offset", "revision")
_SLOT = np.dtype([(name, "<i8") for name in (*_ORDER, "used", "entry")] + [("read_s", "<f8")])
# No user's: where those are looked for that have no row.
_NOBODY = 0


@numba.njit((from_dtype(PLACE)[::1], i8[::1], i8[::1], from_dtype(_SLOT)[::1], i8, f8), cache=True)
def _renew_same(place_B, slot_B, entry_B, slots, used, read_s):
    """Renew the kept rows that are the ones that were read; which were not."""
    others, count = np.empty(len(place_B), np.int64), 0
    for b in range(len(place_B)):
        place, kept = place_B[b], slots[slot_B[b]]
        same = place.epoch == kept.epoch and place.offset == kept.offset and place.revision == kept.revision
        if same and place.status == SOUND and slot_B[b] != _NOBODY and kept.entry == entry_B[b]:
            kept.used, kept.read_s = used, read_s
        else:
            others[count] = b
            count += 1
    return others[:count]


class Found(NamedTuple):
    """Where users' kept rows are: slots, and the entries in them; they may be others' by now."""

    slot_B: np.ndarray
    entry_B: np.ndarray


class KeptRows:
    """Rows of one checkpoint by user; beyond bytes_max the least recently used go. Safe to share between threads.

    A row is good for kept_s after the store gave it, so that one erased meanwhile is not given for longer.
    """

    def __init__(self, bytes_max: int, kept_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._size_bytes, self._bytes_max = 0, bytes_max
        self._kept_s, self._clock = kept_s, clock
        self._calls = self._entries = 0
        self._turn = threading.Lock()
        # There are never fewer: what was found before may be another's by now, and is looked at all the same.
        self._slots = np.zeros(64, _SLOT)
        self._begin()

    @property
    def size_bytes(self) -> int:
        """What the rows take, nearly."""
        return self._size_bytes

    def get(self, user_ids: Sequence[str]) -> list[RowBytes | None]:
        """The rows that are still good."""
        since_s = self._clock() - self._kept_s
        with self._turn:
            self._calls += 1
            slot_B = self._slots_of(user_ids)
            self._slots["used"][slot_B[slot_B != _NOBODY]] = self._calls
            good_B = self._slots["read_s"][slot_B] >= since_s
            return [self._rows[slot] if good else None for slot, good in zip(slot_B, good_B, strict=True)]

    def find(self, user_ids: Sequence[str]) -> Found:
        """What `renew` has to look for, done while there is time."""
        with self._turn:
            slot_B = self._slots_of(user_ids)
            return Found(slot_B, self._slots["entry"][slot_B])

    def renew(
        self, user_ids: Sequence[str], rows: Sequence[RowBytes | None], place_B: np.ndarray, found: Found | None = None
    ) -> list[int]:
        """Keep the sound rows among these that the store gave, and forget users whom it has not.

        place_B: the places of the rows (dtype PLACE). Returns which of the rows are older than those kept, and were
        left out: a store must not go back, but a failover may. When a kept row is too old itself, the store's counts.
        """
        now_s, behind = self._clock(), []
        slot_B, entry_B = self.find(user_ids) if found is None else found
        with self._turn:
            self._calls += 1
            # As a rule all are the rows that were kept before.
            others = _renew_same(place_B, slot_B, entry_B, self._slots, self._calls, now_s)
            for b in others.tolist():
                if place_B["status"][b] == ABSENT:
                    self._forget(user_ids[b])
                elif self._is_behind(user_ids[b], place_B[b], now_s):
                    behind.append(b)
                elif place_B["status"][b] == SOUND:
                    # Only now a row that lies in larger memory is copied.
                    self._put(user_ids[b], rows[b], place_B[b], now_s)
        return behind

    def clear(self) -> None:
        """Forget all: the store is another one."""
        with self._turn:
            self._begin()
            self._slots[:] = np.zeros((), _SLOT)
            self._size_bytes = 0

    def _begin(self) -> None:
        self._slot_of: dict[str, int] = {}
        # By slot.
        self._rows: list[RowBytes | None] = [None]
        self._users: list[str] = [""]
        self._free: list[int] = []
        # The least recently used last, as it was when they were put in order: slots, and their use then.
        self._order: list[tuple[int, int]] = []

    def _slots_of(self, user_ids: Sequence[str]) -> np.ndarray:
        get = self._slot_of.get
        return np.array([get(user_id, _NOBODY) for user_id in user_ids], np.int64)

    def _is_behind(self, user_id: str, place: np.void, now_s: float) -> bool:
        """Whether a sound row is older than the one that is kept, and that one not too old. Counts as a use of it."""
        slot = self._slot_of.get(user_id)
        if slot is None:
            return False
        kept = self._slots[slot]
        kept["used"] = self._calls
        older = [place[name] for name in _ORDER] < [kept[name] for name in _ORDER]
        return place["status"] == SOUND and older and now_s - kept["read_s"] <= self._kept_s

    def _put(self, user_id: str, row: RowBytes | None, place: np.void, now_s: float) -> None:
        self._forget(user_id)
        assert row is not None, "no row is sound that is not there"
        size_bytes = row.size_bytes + _ENTRY_BYTES
        if size_bytes > self._bytes_max:
            return
        self._entries += 1
        slot = self._free.pop() if self._free else len(self._rows)
        if slot == len(self._rows):
            self._rows.append(None)
            self._users.append("")
            if slot == len(self._slots):
                self._slots = np.concatenate([self._slots, np.zeros_like(self._slots)])
        self._slot_of[user_id] = slot
        self._rows[slot], self._users[slot] = row, user_id
        self._slots[slot] = (*(place[name] for name in _ORDER), self._calls, self._entries, now_s)
        self._size_bytes += size_bytes
        while self._size_bytes > self._bytes_max:
            self._forget(self._least_recently_used())

    def _least_recently_used(self) -> str:
        """Of the order made last those are left that were not used since; all others were used after them."""
        while True:
            while self._order:
                slot, used = self._order.pop()
                if self._slots["used"][slot] == used and self._slots["entry"][slot]:
                    return self._users[slot]
            slots = np.flatnonzero(self._slots["entry"])
            # Of one call the last was used last.
            slots = slots[np.lexsort((self._slots["entry"][slots], self._slots["used"][slots]))[::-1]]
            self._order = list(zip(slots.tolist(), self._slots["used"][slots].tolist(), strict=True))

    def _forget(self, user_id: str) -> None:
        slot = self._slot_of.pop(user_id, None)
        if slot is not None:
            self._size_bytes -= self._rows[slot].size_bytes + _ENTRY_BYTES
            self._rows[slot], self._users[slot] = None, ""
            self._slots[slot] = np.zeros((), _SLOT)
            self._free.append(slot)
