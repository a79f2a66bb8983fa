"""The laws of the cache on generated events, against the formula of its docstring (tests.twin)."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.cache import Cache, CacheSpec, EncodedEvents, decay, delta, empty, fold, log_mass, merge
from models.errors import MismatchError
from tests.twin import assert_formula, assert_same_cache, assert_sound, moments_of

HOUR_MS = 3_600_000
START_MS = 1_600_000_000_000
HALF_LIVES_MS = [HOUR_MS, np.inf, 24 * HOUR_MS, 7 * 24 * HOUR_MS, 60_000]
CODEWORDS, WIDTH = 3, 2

laws = settings(max_examples=40, deadline=None)


def make_spec(groups: int = 1, heads_per_group: int = 1, rates: int = 1, checkpoint_id: str = "ab" * 16) -> CacheSpec:
    heads = groups * heads_per_group
    half_life = np.array([HALF_LIVES_MS[n % len(HALF_LIVES_MS)] for n in range(heads * rates)])
    return CacheSpec(
        checkpoint_id=checkpoint_id,
        groups=groups,
        codewords=CODEWORDS,
        value_width=WIDTH,
        rate_HR=(np.log(2.0) / half_life).reshape(heads, rates),
    )


def make_events(spec: CacheSpec, rows: list[tuple[int, float, int, float]]) -> EncodedEvents:
    """Events from (code, value, time after START_MS, weight), the same in every group and head."""
    n = len(rows)
    return EncodedEvents(
        code_NG=np.tile(np.array([row[0] for row in rows], np.uint16).reshape(n, 1), (1, spec.groups)),
        value_NHD=np.tile(np.array([row[1] for row in rows], np.float32).reshape(n, 1, 1), (1, spec.heads, WIDTH)),
        time_ms_N=np.array([START_MS + row[2] for row in rows], np.int64),
        weight_N=np.array([row[3] for row in rows], np.float32),
    )


def take(events: EncodedEvents, at: list[int] | np.ndarray | slice) -> EncodedEvents:
    return EncodedEvents(**{f.name: getattr(events, f.name)[at] for f in dataclasses.fields(events)})


def fold_batches(spec: CacheSpec, events: EncodedEvents, cuts: list[int]) -> Cache:
    cache = empty(spec)
    for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
        cache = fold(cache, take(events, slice(start, end)))
    return cache


specs = st.builds(make_spec, st.sampled_from([1, 2, 4]), st.sampled_from([1, 2]), st.sampled_from([1, 3]))


@st.composite
def cases(draw: st.DrawFn, size_max: int = 8) -> tuple[CacheSpec, EncodedEvents]:
    """A spec and events of positive weight, with times anywhere in four weeks and repeats of everything."""
    spec = draw(specs)
    n = draw(st.integers(0, size_max))
    values = st.floats(-100, 100, width=32, allow_subnormal=False)
    times = st.integers(START_MS, START_MS + 28 * 24 * HOUR_MS) | st.integers(START_MS, START_MS + 3)
    events = EncodedEvents(
        code_NG=draw(hnp.arrays(np.uint16, (n, spec.groups), elements=st.integers(0, CODEWORDS - 1))),
        value_NHD=draw(hnp.arrays(np.float32, (n, spec.heads, WIDTH), elements=values)),
        time_ms_N=draw(hnp.arrays(np.int64, n, elements=times)),
        weight_N=draw(hnp.arrays(np.float32, n, elements=st.floats(0.015625, 64, width=32))),
    )
    return spec, events


@st.composite
def cut_cases(draw: st.DrawFn) -> tuple[CacheSpec, EncodedEvents, list[int], list[int]]:
    """A case with a random order of its events and a random cut into batches."""
    spec, events = draw(cases())
    order = draw(st.permutations(range(len(events))))
    cuts = sorted(draw(st.lists(st.integers(0, len(events)), max_size=4)))
    return spec, events, list(order), cuts


@laws
@given(cases())
def test_delta_is_the_formula_over_raw_events(case):
    spec, events = case
    assert_formula(delta(spec, events), events)


@laws
@given(cut_cases())
def test_order_batching_and_lateness_do_not_matter(case):
    spec, events, order, cuts = case
    cache = fold_batches(spec, take(events, order), cuts)
    assert_formula(cache, events)
    assert_same_cache(cache, delta(spec, events))


@laws
@given(cases())
def test_the_kernel_equals_its_numpy_twin(case):
    spec, events = case
    cache, again = delta(spec, events), take(events, slice(None, None, 2))
    assert_same_cache(fold(cache, again), merge(cache, delta(spec, again)))


@laws
@given(cases(), st.data())
def test_merge_of_any_split_is_the_cache_of_all_events(case, data):
    spec, events = case
    left_N = data.draw(hnp.arrays(np.bool_, len(events)))
    merged = merge(delta(spec, take(events, left_N)), delta(spec, take(events, ~left_N)))
    assert_formula(merged, take(events, np.concatenate([np.flatnonzero(left_N), np.flatnonzero(~left_N)])))


@laws
@given(cases(size_max=12))
def test_merge_is_associative_and_commutative(case):
    spec, events = case
    a, b, c = (delta(spec, take(events, slice(part, None, 3))) for part in range(3))
    assert_same_cache(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same_cache(merge(a, b), merge(b, a))


@laws
@given(cases())
def test_empty_is_the_identity_of_merge_and_fold(case):
    spec, events = case
    cache = delta(spec, events)
    assert_same_cache(merge(cache, empty(spec)), cache)
    assert_same_cache(merge(empty(spec), cache), cache)
    assert_same_cache(fold(empty(spec), events), cache)
    assert fold(cache, take(events, [])) is cache
    assert_same_cache(delta(spec, take(events, [])), empty(spec))


@laws
@given(cases(), st.integers(0, 48 * HOUR_MS), st.integers(0, 48 * HOUR_MS))
def test_decay_composes(case, first_ms, second_ms):
    cache = delta(*case)
    middle_ms = cache.reference_ms + first_ms
    end_ms = middle_ms + second_ms
    assert_same_cache(decay(decay(cache, middle_ms), end_ms), decay(cache, end_ms))
    assert_same_cache(decay(cache, cache.reference_ms), cache)


@laws
@given(cases(), st.integers(0, 48 * HOUR_MS))
def test_decay_distributes_over_merge(case, later_ms):
    spec, events = case
    a, b = (delta(spec, take(events, slice(part, None, 2))) for part in range(2))
    to_ms = max(a.reference_ms, b.reference_ms) + later_ms
    assert_same_cache(decay(merge(a, b), to_ms), merge(decay(a, to_ms), decay(b, to_ms)))


def test_decay_refuses_to_run_backwards():
    spec = make_spec()
    cache = delta(spec, make_events(spec, [(0, 1.0, 0, 1.0)]))
    with pytest.raises(ValueError, match="cannot decay back"):
        decay(cache, cache.reference_ms - 1)


@laws
@given(cases(), st.integers(0, 2 * HOUR_MS))
def test_waiting_changes_no_mean_and_no_ratio_of_masses(case, wait_ms):
    cache = delta(*case)
    now_ms = cache.reference_ms + wait_ms
    waited = decay(cache, now_ms)
    kept = np.isin(cache.code_N, waited.code_N)
    before, after = log_mass(cache, now_ms)[kept], log_mass(waited, now_ms)
    alive = np.isfinite(after)
    np.testing.assert_allclose(after[alive], before[alive], atol=1e-6)
    np.testing.assert_array_equal(waited.mean_NPRD[alive], cache.mean_NPRD[kept][alive])
    for part in range(2):
        group = (cache.code_N // CODEWORDS == part) & np.isfinite(log_mass(cache, now_ms)).all(axis=(1, 2))
        drift = log_mass(cache, now_ms)[group] - log_mass(cache, cache.reference_ms)[group]
        np.testing.assert_allclose(drift, np.broadcast_to(drift[:1], drift.shape), atol=1e-9)


@laws
@given(cases())
def test_folding_twice_counts_twice(case):
    spec, events = case
    once = fold(empty(spec), events)
    twice = fold(once, events)
    assert twice.count == 2 * len(events)
    np.testing.assert_allclose(moments_of(twice), 2 * moments_of(once), rtol=1e-6, atol=1e-28)
    assert len(events) == 0 or not np.array_equal(moments_of(twice), moments_of(once))


@laws
@given(cases())
def test_counts_add_up_and_an_undecayed_mass_is_the_sum_of_weights(case):
    spec, events = case
    half = len(events) // 2
    cache = merge(delta(spec, take(events, slice(0, half))), delta(spec, take(events, slice(half, None))))
    assert cache.count == len(events)
    moment_GKPRS = moments_of(cache).reshape(spec.groups, CODEWORDS, -1, spec.rates, 1 + WIDTH)
    total_HR = moment_GKPRS[..., 0].sum(axis=1).reshape(spec.heads, spec.rates)
    np.testing.assert_allclose(total_HR[spec.rate_HR == 0], events.weight_N.astype(float).sum(), rtol=1e-6)


@laws
@given(cut_cases())
def test_means_stay_in_the_range_of_their_inputs(case):
    spec, events, order, cuts = case
    cache = fold_batches(spec, take(events, order), cuts)
    heads_per_group = spec.heads // spec.groups
    for n, code in enumerate(cache.code_N.tolist()):
        group, codeword = divmod(code, CODEWORDS)
        members = events.code_NG[:, group] == codeword
        for p in range(heads_per_group):
            value_ND = events.value_NHD[members, group * heads_per_group + p]
            mean_RD = cache.mean_NPRD[n, p][cache.mass_NPR[n, p] > 0]
            assert (mean_RD >= value_ND.min(axis=0)).all()
            assert (mean_RD <= value_ND.max(axis=0)).all()


@pytest.mark.parametrize("time_constants", [100, 10_000])
@pytest.mark.parametrize("rates", [1, 3])
def test_long_silences_overflow_nothing(time_constants, rates):
    spec = make_spec(groups=2, heads_per_group=2, rates=rates)
    gap_ms = int(time_constants / spec.rate_HR[spec.rate_HR > 0].max())
    old, new = make_events(spec, [(0, 5.0, 0, 2.0)]), make_events(spec, [(0, 1.0, gap_ms, 1.0), (1, 2.0, gap_ms, 1.0)])
    both = make_events(spec, [(0, 5.0, 0, 2.0), (0, 1.0, gap_ms, 1.0), (1, 2.0, gap_ms, 1.0)])
    for cache in (
        fold(fold(empty(spec), old), new),
        fold(fold(empty(spec), new), old),
        merge(delta(spec, old), delta(spec, new)),
        delta(spec, both),
    ):
        assert_formula(cache, both)
    assert_sound(decay(delta(spec, both), START_MS + 2 * gap_ms))
    assert not np.isnan(log_mass(delta(spec, both), START_MS + 1000 * gap_ms)).any()


def test_a_head_that_never_forgets_keeps_its_mass_through_any_wait():
    spec = make_spec(groups=1, heads_per_group=2)
    cache = decay(delta(spec, make_events(spec, [(0, 5.0, 0, 2.0)])), START_MS + 100_000 * HOUR_MS)
    assert (cache.mass_NPR[0, 0, 0], cache.mass_NPR[0, 1, 0]) == (0.0, 2.0)
    assert (cache.mean_NPRD[0, 1, 0] == 5.0).all()


def test_caches_of_two_checkpoints_are_never_merged():
    ours, theirs = make_spec(checkpoint_id="ab" * 16), make_spec(checkpoint_id="cd" * 16)
    with pytest.raises(MismatchError, match=f"{'ab' * 16} and {'cd' * 16}"):
        merge(empty(ours), empty(theirs))


def test_log_mass_of_a_retracted_or_forgotten_entry_is_minus_infinity():
    spec = make_spec(groups=1, heads_per_group=2)
    cache = delta(spec, make_events(spec, [(0, 1.0, 0, -1.0), (1, 1.0, 0, 1.0), (2, 1.0, 1000 * HOUR_MS, 2.0)]))
    found = log_mass(cache, cache.reference_ms)
    wanted = [[[-np.inf], [-np.inf]], [[-np.inf], [0.0]], [[np.log(2.0)], [np.log(2.0)]]]
    np.testing.assert_allclose(found, wanted)
