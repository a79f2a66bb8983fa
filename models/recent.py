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
    """What becomes of the recent events of U users: their new ones, one user after another, and what was left out.

    record_N is empty for a user of whom nothing is new. erased_U counts the new records up to the last tombstone,
    itself included: where it is not zero, the old recent events are gone as well.
    """

    record_N: np.ndarray
    end_U: np.ndarray
    skipped_U: np.ndarray
    repeated_U: np.ndarray
    erased_U: np.ndarray


def accept(
    recent_N: np.ndarray,
    recent_end_U: np.ndarray,
    event_N: np.ndarray,
    end_U: np.ndarray,
    covered_U: np.ndarray,
    window: int,
) -> Accepted:
    """Add new records to the recent ones (both dtype RECENT, one user after another, rising offsets, ends int64).

    covered_U: the offset up to which each user's records are in the row already; those are skipped.
    """
    record_NW, *counts = _accept_kernel(
        _words(recent_N), recent_end_U, _words(event_N), end_U, np.asarray(covered_U, np.int64), window
    )
    return Accepted(record_NW.reshape(-1).view(RECENT), *counts)


def _words(records: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(records).view(np.uint64).reshape(-1, RECENT.itemsize // 8)


def _accept_loop(recent_NW, recent_end_U, event_NW, end_U, covered_U, window):
    """Records are three words: position (16 bits of hash at its end), time with action and hash, item and weight."""
    users = end_U.shape[0]
    out_NW = np.empty((recent_NW.shape[0] + event_NW.shape[0], 3), np.uint64)
    out_end_U, skipped_U = np.empty(users, np.int64), np.empty(users, np.int64)
    repeated_U, erased_U = np.zeros(users, np.int64), np.zeros(users, np.int64)
    low, sixteen, size_bits = np.uint64(0xFFFF), np.uint64(16), np.uint64(0x7FFFFFFF)
    at = recent_end = event_end = 0
    for u in range(users):
        recent_start, recent_end = recent_end, recent_end_U[u]
        n, event_end = event_end, end_U[u]
        skipped_U[u] = -n
        while n < event_end and np.int64(event_NW[n, 0] >> sixteen) <= covered_U[u]:
            n += 1
        skipped_U[u] += n
        if n < event_end:
            fresh, first = n, at
            for m in range(fresh, event_end):
                # Weight is the upper half of the last word; plus and minus zero differ in the sign alone.
                if (event_NW[m, 2] >> np.uint64(32)) & size_bits == 0:
                    n = m + 1
            erased_U[u] = n - fresh
            newest = np.uint64(0)
            if n == fresh:
                for m in range(recent_start, recent_end):
                    out_NW[at] = recent_NW[m]
                    newest = max(newest, recent_NW[m, 1])
                    at += 1
            for m in range(n, event_end):
                position, time, rest = event_NW[m, 0] & low, event_NW[m, 1], event_NW[m, 2]
                same = False
                # Most events are later than all before them, and so none of them.
                if time <= newest:
                    for held in range(first, at):
                        if out_NW[held, 1] == time and out_NW[held, 2] == rest and out_NW[held, 0] & low == position:
                            same = True
                            break
                newest = max(newest, time)
                if same:
                    repeated_U[u] += 1
                    continue
                out_NW[at] = event_NW[m]
                at += 1
                # Where folding would begin: what is folded cannot be recognised any more.
                if window == 0:
                    first = at
                elif at - first >= 2 * window:
                    first += window
        out_end_U[u] = at
    return out_NW[:at], out_end_U, skipped_U, repeated_U, erased_U


# unwrap: as in models.cache.
_accept_kernel = numba.njit(cache=True)(unwrap(_accept_loop))
