"""Which of a user's new records count: what a tombstone erases, and what a producer sent twice.

A producer that retries may send one event at two offsets. The second one is recognised while the first is among the
user's recent events: same event id (24 bits of its hash), time, action, item and weight. What is recent at an event
is what the row would hold had the events come one at a time, so how a log is cut into batches does not matter.

A tombstone is a record of weight 0: it erases what came before it, and is not kept itself.
Knows records of dtype wire.RECENT and nothing of folding.
"""

from __future__ import annotations

from inspect import unwrap
from typing import NamedTuple

import numba
import numpy as np

from models.wire import RECENT


class Accepted(NamedTuple):
    """The records to append, in order; how many were repeats; the place of the last tombstone, -1 for none."""

    events: np.ndarray
    repeated: int
    tombstone: int


def accept(recent: np.ndarray, events: np.ndarray, window: int) -> Accepted:
    """Of new records (dtype RECENT, rising offsets), those that count after `recent`.

    Where there is a tombstone, only what comes after the last one, and nothing of `recent` can be repeated.
    """
    kept_N, repeated, tombstone = _accept_kernel(_words(recent), _words(events), window)
    return Accepted(events if len(kept_N) == len(events) else events[kept_N], int(repeated), int(tombstone))


def _words(records: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(records).view(np.uint64).reshape(-1, RECENT.itemsize // 8)


def _accept_loop(recent_NW, event_NW, window):
    """Records are three words: position (16 bits of hash at its end), time with action and hash, item and weight."""
    tombstone = -1
    for n in range(event_NW.shape[0]):
        # Weight is the upper half of the last word; plus and minus zero differ in the sign alone.
        if (event_NW[n, 2] >> np.uint64(32)) & np.uint64(0x7FFFFFFF) == 0:
            tombstone = n
    old = recent_NW.shape[0] if tombstone < 0 else 0
    kept = np.empty(event_NW.shape[0], np.int64)
    held = np.empty((old + event_NW.shape[0], 3), np.uint64)
    held[:old] = recent_NW[:old]
    count, repeated, first, end = 0, 0, 0, old
    low = np.uint64(0xFFFF)
    for n in range(tombstone + 1, event_NW.shape[0]):
        position, time, rest = event_NW[n, 0] & low, event_NW[n, 1], event_NW[n, 2]
        same = False
        for m in range(first, end):
            if held[m, 1] == time and held[m, 2] == rest and held[m, 0] & low == position:
                same = True
                break
        if same:
            repeated += 1
            continue
        kept[count] = n
        count += 1
        if window > 0:
            held[end] = event_NW[n]
            end += 1
            if end - first >= 2 * window:
                first += window
    return kept[:count], repeated, tombstone


# unwrap: as in models.cache.
_accept_kernel = numba.njit(cache=True)(unwrap(_accept_loop))
