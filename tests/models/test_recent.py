"""What counts after what: repeats within the window, tombstones; against a plain twin, one record at a time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.recent import accept
from models.row import Left, advance, new_row
from models.wire import pack_recent, recent_offsets
from tests.models.test_row import POSITION, advance_all, assert_same_row, make_fold
from tests.small import START_MS

laws = settings(max_examples=100, deadline=None)
# Small numbers, so that repeats abound; a weight of 0 is a tombstone.
records = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 1), st.sampled_from([1.0, -1.0, 2.0]), st.integers(0, 2))
    | st.just((0, 0, 0.0, 0)),
    max_size=40,
)


def packed(rows: list[tuple[int, int, float, int]], first_offset: int = 0) -> np.ndarray:
    item, minute, weight, event = (np.array(c) for c in zip(*rows, strict=True)) if rows else (np.empty(0),) * 4
    return pack_recent(
        offset_N=np.arange(first_offset, first_offset + len(rows)),
        time_ms_N=np.where(weight == 0, 0, START_MS + minute * 60_000),
        action_N=np.zeros(len(rows)),
        item_N=item,
        weight_N=weight,
        event_hash_N=event * 77_777,
    )


def one_at_a_time(recent: list, events: list, window: int) -> tuple[list, int]:
    """The plain twin: records as (offset, what) pairs; what is None for a tombstone."""
    held, added, repeated = list(recent), [], 0
    for offset, what in events:
        if what is None:
            held, added, repeated = [], [], 0
        elif what in [other for _, other in held]:
            repeated += 1
        else:
            added.append((offset, what))
            if window:
                held.append((offset, what))
                held = held[window:] if len(held) == 2 * window else held
    return added, repeated


def plain(events: np.ndarray) -> list:
    """Everything of a record but its offset, beside its offset."""
    out = []
    for offset, record in zip(recent_offsets(events).tolist(), events, strict=True):
        what = (int(record["position"]) & 0xFFFF, int(record["time"]), int(record["item"]), float(record["weight"]))
        out.append((offset, None if what[3] == 0 else what))
    return out


@laws
@given(
    st.lists(st.tuples(records, records, st.integers(-1, 1041)), min_size=1, max_size=4), st.sampled_from([0, 1, 2, 5])
)
def test_what_is_accepted_is_what_one_record_after_another_gives(users, window):
    """Users beside each other, each with recent events, new ones, and an offset up to which those are in the row."""
    recents = [packed([row for row in before if row[2]][: max(0, 2 * window - 1)]) for before, _, _ in users]
    events, covered = [packed(after, 1000) for _, after, _ in users], [at for _, _, at in users]
    found = accept(
        np.concatenate(recents),
        np.cumsum([*map(len, recents)]),
        np.concatenate(events),
        np.cumsum([*map(len, events)]),
        np.array(covered),
        window,
    )
    start = 0
    for u, end in enumerate(found.end_U.tolist()):
        fresh = [(offset, what) for offset, what in plain(events[u]) if offset > covered[u]]
        added, repeated = one_at_a_time(plain(recents[u]), fresh, window)
        erased = max((n + 1 for n, (_, what) in enumerate(fresh) if what is None), default=0)
        kept = plain(recents[u]) if fresh and not erased else []
        assert plain(found.record_N[start:end]) == kept + added
        counts = (found.skipped_U[u], found.repeated_U[u], found.erased_U[u])
        assert counts == (len(events[u]) - len(fresh), repeated, erased)
        start = end


@laws
@given(records, st.sampled_from([0, 1, 2, 5]), st.lists(st.integers(0, 40), max_size=5))
def test_how_a_log_with_repeats_and_tombstones_is_cut_does_not_matter(rows, window, cuts):
    # A retraction of nothing that was there may cancel something else, which the cut then decides: none here.
    using, log = make_fold(window), packed([(item, minute, abs(weight), event) for item, minute, weight, event in rows])
    whole = advance_all(using, [log[n : n + 1] for n in range(len(log))])
    assert_same_row(advance_all(using, np.split(log, sorted(min(cut, len(log)) for cut in cuts))), whole)


def test_a_repeat_within_the_window_is_not_added_and_does_not_move_the_stamp():
    using, log = make_fold(4), packed([(1, 0, 1.0, 1), (2, 0, 1.0, 2), (1, 0, 1.0, 1)])
    row, left = advance(new_row(using.spec, 0, 0), log, POSITION, using)
    assert left == Left(repeated=1)
    assert (row.count, row.stamp.offset) == (2, 1)
    assert advance(row, packed([(2, 0, 1.0, 2)], 9), POSITION, using) == (row, Left(repeated=1))


@pytest.mark.parametrize("other", [(1, 1, 1.0, 1), (2, 0, 1.0, 1), (1, 0, -1.0, 1), (1, 0, 2.0, 1), (1, 0, 1.0, 2)])
def test_an_event_that_differs_in_anything_is_no_repeat(other):
    using = make_fold(4)
    row, left = advance(new_row(using.spec, 0, 0), packed([(1, 0, 1.0, 1), other]), POSITION, using)
    assert (left, row.count) == (Left(), 2)


def test_a_repeat_beyond_the_window_is_a_new_event():
    using = make_fold(2)
    rows = [(1, 0, 1.0, 1), *((n, 1, 1.0, 2) for n in range(4)), (1, 0, 1.0, 1)]
    row, left = advance(new_row(using.spec, 0, 0), packed(rows), POSITION, using)
    assert (left, row.count) == (Left(), 6)


def test_a_tombstone_erases_what_came_before_and_leaves_its_stamp():
    using = make_fold(2)
    row, _ = advance(new_row(using.spec, 0, 0), packed([(n % 3, n, 1.0, n) for n in range(9)]), POSITION, using)
    assert row.folded_count > 0
    erased, left = advance(row, packed([(1, 0, 1.0, 1), (0, 0, 0.0, 0)], 9), POSITION, using)
    assert left == Left(erased=2)
    assert (erased.count, len(erased.recent), len(erased.folded.code_N), erased.stamp.offset) == (0, 0, 0, 10)
    again, left = advance(erased, packed([(n % 3, n, 1.0, n) for n in range(9)]), POSITION, using)
    assert (again, left) == (erased, Left(skipped=9))


def test_what_follows_a_tombstone_is_all_that_is_known():
    using, tail = make_fold(2), [(1, 0, 1.0, 1), (2, 0, 1.0, 2), (0, 3, 1.0, 2)]
    log = packed([(n % 3, n, 1.0, n) for n in range(9)] + [(0, 0, 0.0, 0)] + tail)
    row, left = advance(new_row(using.spec, 0, 0), log, POSITION, using)
    assert left == Left(erased=10)
    fresh, _ = advance(new_row(using.spec, 0, 0), log[10:], POSITION, using)
    assert (row.count, row.recent.tobytes()) == (3, fresh.recent.tobytes())
    assert row.folded.code_N.tolist() == fresh.folded.code_N.tolist()
