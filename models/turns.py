"""Whose turn it is: the rows of a batch, taken one by one by the threads that work on it, as they come.

turn_4: the next row that nobody has taken, up to which they are there, how many are done, and up to which they will
come. Compiled code takes rows without the interpreter and without a lock, and waits for those that will come soon.
"""

from __future__ import annotations

from inspect import unwrap

import numba
import numpy as np
from numba import types

from models.memory import load_shared, store_shared, swap_shared

# Of a thread that waits for another's last row, which takes as long as some ten of these.
YIELDS = 200
# Of a thread that waits for the next rows: some tenths of a millisecond. To be woken for them takes both threads longer
# than a nearby store, and a store that is further away is not waited for.
YIELDS_FOR_MORE = 1000
_sched_yield = types.ExternalFunction("sched_yield", types.int32())


def turns(first: int, end: int, coming: int) -> np.ndarray:
    """Turns of the rows from `first` to `end`, without it, and of those that will come up to `coming`."""
    return np.array([first, end, first, coming], np.int64)


def _next_row(turn_4):
    """A row that is now this thread's alone; -1 where none is left, and none has come after a short wait."""
    next_at, there_at, yields = turn_4.ctypes.data, turn_4.ctypes.data + 8, 0
    while True:
        row = load_shared(next_at)
        if row < load_shared(there_at):
            if swap_shared(next_at, row, row + 1):
                return row
        elif row >= turn_4[3] or yields == YIELDS_FOR_MORE:
            return -1
        else:
            yields += 1
            _sched_yield()


def _row_done(turn_4):
    """A row that was taken is done."""
    done_at = turn_4.ctypes.data + 16
    done = load_shared(done_at)
    while not swap_shared(done_at, done, done + 1):
        done = load_shared(done_at)


def _rows_there(turn_4, end):
    """Rows up to this one can be taken from now on; what was written of them before is seen by who takes them."""
    store_shared(turn_4.ctypes.data + 8, end)


def _all_done(turn_4):
    """Whether all rows that are there are done, after a short wait if need be; what they wrote is seen then."""
    there_at, done_at = turn_4.ctypes.data + 8, turn_4.ctypes.data + 16
    for _ in range(YIELDS):
        if load_shared(done_at) >= load_shared(there_at):
            return True
        _sched_yield()
    return False


# unwrap: in tests the functions of this module carry run-time shape checks, which numba cannot compile.
next_row, row_done = (numba.njit(cache=True, nogil=True)(unwrap(each)) for each in (_next_row, _row_done))
rows_there = numba.njit("(i8[::1], i8)", cache=True)(unwrap(_rows_there))
all_done = numba.njit("b1(i8[::1])", cache=True, nogil=True)(unwrap(_all_done))
