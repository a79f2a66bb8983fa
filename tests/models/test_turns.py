"""Rows are taken by one thread each, as they come, and none is said to be done that is not."""

from __future__ import annotations

from inspect import unwrap
from threading import Thread

import numba
import numpy as np

from models.turns import all_done, next_row, row_done, rows_there, turns


def _take(turn_4, taken_N, end):
    """Take rows until all up to `end` are taken; who else takes one too is seen in its number."""
    took = 0
    while turn_4[0] < end:
        row = next_row(turn_4)
        if row >= 0:
            taken_N[row] += 1
            took += 1
            row_done(turn_4)
    return took


take = numba.njit(nogil=True)(unwrap(_take))


def test_of_many_threads_each_row_has_one_and_all_are_counted():
    # So many that threads meet, even where others' work leaves them little time.
    rows = 5_000_000
    turn_4, taken_N, took = turns(0, 0, rows), np.zeros(rows, np.int8), []
    take(turns(0, 0, 0), taken_N, 0)
    threads = [Thread(target=lambda: took.append(take(turn_4, taken_N, rows))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for end in range(50_000, rows + 1, 50_000):
        rows_there(turn_4, end)
    for thread in threads:
        thread.join()
    assert sum(took) == rows
    assert (taken_N == 1).all()
    assert turn_4.tolist() == [rows] * 4


def test_rows_are_done_when_who_took_them_says_so():
    turn_4 = turns(3, 5, 5)
    assert [next_row(turn_4) for _ in range(3)] == [3, 4, -1]
    row_done(turn_4)
    assert not all_done(turn_4)
    row_done(turn_4)
    assert all_done(turn_4)


def test_rows_that_will_come_are_not_waited_for_without_end():
    turn_4 = turns(0, 0, 1)
    assert next_row(turn_4) == -1
    rows_there(turn_4, 1)
    assert [next_row(turn_4) for _ in range(2)] == [0, -1]
