"""Retractions in the cache: an event of negative weight takes its event's mass and value out again."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.cache import Cache, CacheSpec, EncodedEvents, delta, fold, merge
from tests.models.test_cache import HOUR_MS, cases, fold_batches, make_events, make_spec, specs, take
from tests.twin import assert_formula, assert_sound

laws = settings(max_examples=40, deadline=None)
Row = tuple[int, float, int, float]


def retraction(row: Row) -> Row:
    code, value, time_ms, weight = row
    return (code, value, time_ms, -weight)


def fold_one_by_one(spec: CacheSpec, rows: list[Row]) -> Cache:
    return fold_batches(spec, make_events(spec, rows), list(range(1, len(rows))))


times = st.integers(0, 28 * 24 * HOUR_MS)
values = st.floats(-100, 100, width=32, allow_subnormal=False)
# Powers of three: no sum of a few of them, signed, is zero unless each is taken out again.
rows = st.tuples(st.just(0), values, times, st.sampled_from([1.0, 3.0, 9.0, 27.0, 81.0]))


@st.composite
def logs(draw: st.DrawFn) -> list[Row]:
    """A log in which some events are retracted, each after it happened; items share codewords."""
    events = draw(st.lists(rows, min_size=1, max_size=5, unique_by=lambda row: row[3]))
    log = list(events)
    for row in draw(st.lists(st.sampled_from(events), unique=True)):
        log.insert(draw(st.integers(log.index(row) + 1, len(log))), retraction(row))
    return log


@laws
@given(specs, st.lists(rows, min_size=1, max_size=3), st.data())
def test_an_entry_whose_event_was_retracted_is_gone_in_any_order_and_batching(spec, pairs, data):
    placed = [(code, *row[1:]) for code, row in enumerate(pairs)]
    order = data.draw(st.permutations([*placed, *map(retraction, placed)]))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=6)))
    cache = fold_batches(spec, make_events(spec, order), cuts)
    assert_sound(cache)
    assert len(cache.code_N) == 0
    assert cache.count == 2 * len(pairs)


@laws
@given(specs, logs(), st.data())
def test_a_log_with_retractions_is_the_formula_in_any_batching(spec, log, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), max_size=6)))
    events = make_events(spec, log)
    assert_formula(fold_batches(spec, events, cuts), events)


@laws
@given(specs, logs(), st.data())
def test_merging_the_two_halves_of_a_log_with_retractions_is_the_formula(spec, log, data):
    events = make_events(spec, log)
    cut = data.draw(st.integers(0, len(log)))
    assert_formula(merge(delta(spec, take(events, slice(0, cut))), delta(spec, take(events, slice(cut, None)))), events)


@laws
@given(cases())
def test_retracting_every_event_in_one_fold_leaves_nothing(case):
    spec, events = case
    undo = EncodedEvents(
        code_NG=events.code_NG,
        value_NHD=events.value_NHD,
        time_ms_N=events.time_ms_N,
        weight_N=-events.weight_N,
    )
    merged = merge(delta(spec, events), delta(spec, undo))
    assert len(merged.code_N) == 0
    assert len(fold(delta(spec, events), undo).code_N) == 0


@pytest.mark.parametrize("rates", [1, 3])
def test_other_entries_do_not_notice_a_retraction(rates):
    spec = make_spec(groups=2, heads_per_group=2, rates=rates)
    kept, wrong = (1, 2.0, 50_000, 1.5), (0, -3.0, 70_000, 1.0)
    log = [retraction(wrong), kept, wrong]
    found = fold_one_by_one(spec, log)
    assert found.code_N.tolist() == fold_one_by_one(spec, [kept]).code_N.tolist()
    assert (found.mean_NPRD == 2.0).all()
    assert_formula(found, make_events(spec, log))


def test_a_retraction_that_comes_before_its_event_in_a_shared_codeword_leaves_the_right_mass():
    """The limit that models.cache states: the mass is right, the mean forgets what was exactly cancelled."""
    spec = make_spec(heads_per_group=2)
    other, event = (0, 1.0, 0, 1.0), (0, 3.0, 0, 1.0)
    cache = fold_one_by_one(spec, [other, retraction(event), event])
    assert_sound(cache)
    assert cache.net_N.tolist() == [1]
    assert (cache.mass_NPR == 1.0).all()


def test_retracting_events_one_by_one_in_separate_folds_leaves_nothing():
    spec = make_spec(heads_per_group=2)
    first, second = (0, 1.5, 0, 1.0), (0, -2.0, 7 * HOUR_MS + 12_345, 1.0)
    cache = fold_one_by_one(spec, [first, second, retraction(second), retraction(first)])
    assert not np.isnan(cache.mean_NPRD).any()
    assert cache.code_N.tolist() == []
