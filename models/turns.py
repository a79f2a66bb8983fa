"""Whose turn it is: the rows of a batch, taken one by one by the threads that work on it, as they come.

turn_3: the next row that nobody has taken, up to which they are there, and how many are done. Compiled code takes rows
without the interpreter and without a lock.
"""

from __future__ import annotations

from inspect import unwrap

import numba
import numpy as np
from numba import types

from models.memory import load_shared, store_shared, swap_shared

# Of a thread that waits for another's last row, which takes as long as some ten of these.
YIELDS = 200
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


def turns(first: int, end: int) -> np.ndarray:
    """Turns of the rows from `first` to `end`, without it."""
    return np.array([first, end, first], np.int64)


def _next_row(turn_3):
    """A row that is now this thread's alone; -1 where none is left."""
    next_at, there_at = turn_3.ctypes.data, turn_3.ctypes.data + 8
    while True:
        row = load_shared(next_at)
        if row >= load_shared(there_at):
            return -1
        if swap_shared(next_at, row, row + 1):
            return row


def _row_done(turn_3):
    """A row that was taken is done."""
    done_at = turn_3.ctypes.data + 16
    done = load_shared(done_at)
    while not swap_shared(done_at, done, done + 1):
        done = load_shared(done_at)


def _rows_there(turn_3, end):
    """Rows up to this one can be taken from now on; what was written of them before is seen by who takes them."""
    store_shared(turn_3.ctypes.data + 8, end)


def _all_done(turn_3):
    """Whether all rows that are there are done, after a short wait if need be; what they wrote is seen then."""
    there_at, done_at = turn_3.ctypes.data + 8, turn_3.ctypes.data + 16
    for _ in range(YIELDS):
        if load_shared(done_at) >= load_shared(there_at):
            return True
        _sched_yield()
    return False


# unwrap: in tests the functions of this module carry run-time shape checks, which numba cannot compile.
next_row, row_done = (numba.njit(cache=True, nogil=True)(unwrap(each)) for each in (_next_row, _row_done))
rows_there = numba.njit("(i8[::1], i8)", cache=True)(unwrap(_rows_there))
all_done = numba.njit("b1(i8[::1])", cache=True, nogil=True)(unwrap(_all_done))
