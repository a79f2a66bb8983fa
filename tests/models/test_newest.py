"""The newest events of a row: by event time, without what was taken back, and as far as the row still has them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.cache_kernels import EVENT, PLACE
from models.newest import COLUMNS, newest, newest_kernel, newest_of
from models.row import Fold, advance, new_row
from models.row_places import DAMAGED, SOUND
from models.wire import Stamp, pack_recent, recent_times
from tests.models.test_row import POSITION, make_fold
from tests.small import HOUR_MS, START_MS

WINDOW, NEWEST = 8, 5


def using(window: int = WINDOW, length: int = NEWEST) -> Fold:
    fold = make_fold(window)
    return Fold(spec=fold.spec, window=window, table=fold.table, newest=length)


def events(hours: list[int], weights: list[float] | None = None, items: list[int] | None = None) -> np.ndarray:
    """Records at these hours, in the log's order; item 1 where none is given."""
    count = len(hours)
    return pack_recent(
        np.arange(count),
        START_MS + np.array(hours, np.int64) * HOUR_MS,
        np.zeros(count, np.int64),
        np.array(items or [1] * count),
        np.array(weights or [1.0] * count, np.float32),
        np.arange(count),
    )


def by_kernel(event_N: np.ndarray, length: int) -> np.ndarray:
    """The items that the kernel gives for one user's recent events, beside a user who cannot be used."""
    place_B = np.zeros(2, PLACE)
    place_B["events"], place_B["status"] = len(event_N), [SOUND, DAMAGED]
    columns = [np.full((2, length), 7, dtype) for dtype in COLUMNS.values()]
    newest_kernel(place_B, event_N, *columns)
    assert not any(column_BL[1].any() for column_BL in columns)
    return columns[0][0]


def hours_of(records: np.ndarray, fold: Fold, start: Stamp = POSITION) -> list[int]:
    """The hours of what is newest in the row of these records."""
    row, _ = advance(new_row(fold.spec, 0, 0), records, start, fold)
    found = newest_of([row], fold)
    return ((found.time_ms_BL[found.weight_BL > 0] - START_MS) // HOUR_MS).tolist()


def test_they_are_by_event_time_and_of_equal_times_the_later_in_the_log():
    fold = using(length=3)
    row, _ = advance(new_row(fold.spec, 0, 0), events([5, 1, 5, 9, 5], items=[1, 2, 3, 4, 5]), POSITION, fold)
    assert newest_of([row], fold).item_BL.tolist() == [[3, 5, 4]]


def test_there_are_no_more_than_the_user_has_and_none_of_nobody():
    fold = using()
    row, _ = advance(new_row(fold.spec, 0, 0), events([3, 4]), POSITION, fold)
    found = newest_of([row, None], fold)
    assert found.weight_BL.tolist() == [[0, 0, 0, 1, 1], [0] * 5]
    assert (found.time_ms_BL > 0).tolist() == [[False] * 3 + [True] * 2, [False] * 5]


def test_a_retraction_is_none_of_them_and_neither_is_its_event():
    assert hours_of(events([1, 2, 3, 2], [1, 1, 1, -1]), using()) == [1, 3]
    # It takes back one event of two alike, and none that differs in anything.
    assert hours_of(events([1, 2, 2, 2], [1, 1, 1, -1]), using()) == [1, 2]
    assert hours_of(events([1, 2, 2], [1, 2, -1]), using()) == [1, 2]
    assert hours_of(events([1, 2, 2], [1, 1, -1], [1, 2, 3]), using()) == [1, 2]
    # What it was to take back is folded already.
    assert hours_of(events([0, *range(1, 16), 0], [1.0] * 16 + [-1]), using()) == [11, 12, 13, 14, 15]


def test_what_was_erased_is_none_of_them():
    records = events([1, 2, 3, 4], [1, 1, 0, 1])
    assert hours_of(records, using()) == [4]
    assert hours_of(records[:3], using()) == []


def test_a_new_epoch_of_the_log_begins_anew():
    fold = using()
    row, _ = advance(new_row(fold.spec, 0, 0), events([1, 2, 3]), POSITION, fold)
    row, _ = advance(row, events([4]), Stamp(epoch=1, partition=0, offset=-1), fold)
    assert (newest_of([row], fold).weight_BL > 0).sum() == 1


@given(st.integers(0, 2**32 - 1), st.integers(0, 60), st.integers(0, WINDOW - NEWEST))
def test_they_are_the_newest_of_the_whole_history_unless_too_many_came_late(seed, count, late):
    rng = np.random.default_rng(seed)
    hours = np.arange(100, 100 + count)
    # Of any so many events in a row at most `late` are late, by hours or by all there is.
    at = np.arange(count) % WINDOW < late
    hours[at] -= rng.integers(0, 100, at.sum())
    records = events(hours.tolist())
    by_time = np.sort(hours, kind="stable")[max(0, count - NEWEST) :]
    assert hours_of(records, using()) == by_time.tolist()


def test_when_more_came_late_they_are_the_newest_of_what_is_recent():
    late = WINDOW - NEWEST + 1
    hours = [*range(50, 50 + WINDOW + NEWEST - late), *range(late)]
    # All that is recent and in the order of time: the newest event of the history is not among the last WINDOW.
    hours = [99, *hours, *hours[-late:]]
    fold = using()
    row, _ = advance(new_row(fold.spec, 0, 0), events(hours), POSITION, fold)
    held = sorted(((recent_times(row.recent) - START_MS) // HOUR_MS).tolist())
    assert 99 not in held
    assert hours_of(events(hours), fold) == held[-NEWEST:] != sorted(hours)[-NEWEST:]


@pytest.mark.parametrize("length", [1, 5, 100])
def test_the_newest_of_many_are_as_sorting_gives_them(length):
    rng = np.random.default_rng(length)
    event_N = np.zeros(60, EVENT)
    event_N["time_ms"], event_N["weight"] = rng.integers(0, 20, 60), rng.uniform(1, 2, 60)
    event_N["item"] = np.arange(60)
    wanted = sorted(range(60), key=lambda n: (event_N["time_ms"][n], n))[-length:]
    assert newest(event_N, length)["item"].tolist() == wanted
    assert by_kernel(event_N, length).tolist() == [0] * (length - len(wanted)) + wanted


def test_the_kernel_takes_back_what_its_twin_does():
    rng = np.random.default_rng(0)
    for _ in range(200):
        event_N = np.zeros(12, EVENT)
        event_N["time_ms"], event_N["action"] = rng.integers(0, 3, 12), rng.integers(0, 2, 12)
        event_N["item"], event_N["weight"] = rng.integers(1, 3, 12), rng.choice([1, 1, 2, -1], 12)
        wanted = newest(event_N, 6)["item"].tolist()
        assert by_kernel(event_N, 6).tolist() == [0] * (6 - len(wanted)) + wanted
