"""The laws of counts on generated events, against the sum that their docstring states, in float64 and without cells."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.cache import Cache, decay, empty, merge
from models.count_kernels import BEYOND, NO_CELL
from models.counts import Asked, CountedEvents, Counter, CountPlan, delta, exact_cells, fold, read
from tests.models.test_cache import HALF_LIVES_MS, HOUR_MS, START_MS

TOLERANCE = 3e-6
FEW_CELLS = 7

laws = settings(max_examples=60, deadline=None)


def make_plan(fields: int = 2, rates: int = 1, cells: int = BEYOND) -> CountPlan:
    lives = [None if math.isinf(h) else float(h) for h in HALF_LIVES_MS[:rates]]
    return CountPlan(fields=["item_id", "category", "brand"][:fields], half_life_ms=lives, cells=cells)


def take(events: CountedEvents, at: list[int] | np.ndarray | slice) -> CountedEvents:
    return CountedEvents(**{f.name: getattr(events, f.name)[at] for f in dataclasses.fields(events)})


@st.composite
def cases(draw: st.DrawFn, size_max: int = 9) -> tuple[CountPlan, CountedEvents]:
    """Events of positive weight in few cells, NO_CELL among them, anywhere in four weeks."""
    plan = make_plan(draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2, 5])), BEYOND)
    n = draw(st.integers(0, size_max))
    cell = st.integers(0, FEW_CELLS - 1) | st.just(BEYOND - 1)
    times = st.integers(START_MS, START_MS + 28 * 24 * HOUR_MS) | st.integers(START_MS, START_MS + 3)
    events = CountedEvents(
        cell_NQ=draw(hnp.arrays(np.uint16, (n, len(plan.fields)), elements=cell)),
        time_ms_N=draw(hnp.arrays(np.int64, n, elements=times)),
        weight_N=draw(hnp.arrays(np.float32, n, elements=st.floats(0.015625, 64, width=32))),
    )
    return plan, events


@st.composite
def cut_cases(draw: st.DrawFn) -> tuple[CountPlan, CountedEvents, list[int], list[int]]:
    """A case with a random order of its events and a random cut into batches."""
    plan, events = draw(cases())
    order = draw(st.permutations(range(len(events))))
    return plan, events, list(order), sorted(draw(st.lists(st.integers(0, len(events)), max_size=4)))


def fold_batches(plan: CountPlan, events: CountedEvents, cuts: list[int]) -> Cache:
    counts = empty(spec_of(plan))
    for start, end in zip([0, *cuts], [*cuts, len(events)], strict=True):
        counts = fold(counts, take(events, slice(start, end)))
    return counts


def spec_of(plan: CountPlan):
    return plan.spec("ab" * 16)


def direct(plan: CountPlan, events: CountedEvents, as_of_ms: int) -> dict[int, tuple[list[float], list[float]]]:
    """Per cell, the count at each rate and the sum of what it is made of, absolutely."""
    sums: dict[int, list[float]] = {}
    gross: dict[int, list[float]] = {}
    for cell_Q, time_ms, weight in zip(events.cell_NQ, events.time_ms_N, events.weight_N, strict=True):
        for cell in cell_Q.tolist():
            if cell == NO_CELL:
                continue
            for r, half_life in enumerate(plan.half_life_ms):
                age = float(as_of_ms - time_ms)
                term = float(weight) * (1.0 if half_life is None else 0.5 ** (age / half_life))
                sums.setdefault(cell, [0.0] * len(plan.half_life_ms))[r] += term
                gross.setdefault(cell, [0.0] * len(plan.half_life_ms))[r] += abs(term)
    return {cell: (sums[cell], gross[cell]) for cell in sums}


def assert_formula(plan: CountPlan, counts: Cache, events: CountedEvents) -> None:
    assert_sound(counts)
    assert counts.count == len(events)
    assert counts.reference_ms == int(events.time_ms_N.max(initial=0))
    wanted = direct(plan, events, counts.reference_ms)
    held = {int(cell): mass_PR[0] for cell, mass_PR in zip(counts.code_N, counts.mass_NPR, strict=True)}
    assert set(held) <= set(wanted)
    for cell, (sums, gross) in wanted.items():
        for r, (total, allowed) in enumerate(zip(sums, gross, strict=True)):
            mass = float(held[cell][r]) if cell in held else 0.0
            assert abs(mass - total) <= TOLERANCE * allowed + 1e-29, (cell, r, mass, total)


def assert_sound(counts: Cache) -> None:
    assert (np.diff(counts.code_N.astype(int)) > 0).all()
    assert NO_CELL not in counts.code_N
    assert np.isfinite(counts.mass_NPR).all()
    assert (counts.mass_NPR != 0).any(axis=(1, 2)).all()
    assert (counts.code_N.dtype, counts.net_N.dtype, counts.mass_NPR.dtype) == (np.uint16, np.int32, np.float32)
    assert counts.mean_NPRD.shape == (*counts.mass_NPR.shape, 0)


def assert_same(found: Cache, wanted: Cache) -> None:
    assert_sound(found)
    assert_sound(wanted)
    assert (found.reference_ms, found.count) == (wanted.reference_ms, wanted.count)
    a, b = by_cell(found), by_cell(wanted)
    np.testing.assert_allclose(a, b, rtol=TOLERANCE, atol=1e-28)
    if (found.spec.rate_HR == 0).any():
        # Else an old entry may vanish on its way through one order and not through another, and its net count with it.
        np.testing.assert_array_equal(found.code_N, wanted.code_N)
        np.testing.assert_array_equal(found.net_N, wanted.net_N)


def by_cell(counts: Cache) -> np.ndarray:
    mass = np.zeros((BEYOND, counts.spec.rates))
    mass[counts.code_N] = counts.mass_NPR[:, 0]
    return mass


@laws
@given(cases())
def test_delta_is_the_sum_over_raw_events(case):
    plan, events = case
    assert_formula(plan, delta(spec_of(plan), events), events)


@laws
@given(cut_cases())
def test_order_batching_and_lateness_do_not_matter(case):
    plan, events, order, cuts = case
    counts = fold_batches(plan, take(events, order), cuts)
    assert_formula(plan, counts, events)
    assert_same(counts, delta(spec_of(plan), events))


@laws
@given(cases())
def test_the_kernel_equals_its_numpy_twin(case):
    plan, events = case
    spec, again = spec_of(plan), take(events, slice(None, None, 2))
    counts = delta(spec, events)
    assert_same(fold(counts, again), merge(counts, delta(spec, again)))
    assert fold(counts, take(events, [])) is counts
    assert_same(fold(empty(spec), events), counts)


@laws
@given(cases(size_max=12))
def test_merge_is_associative_and_commutative_with_empty_as_identity(case):
    plan, events = case
    spec = spec_of(plan)
    a, b, c = (fold(empty(spec), take(events, slice(part, None, 3))) for part in range(3))
    assert_same(merge(merge(a, b), c), merge(a, merge(b, c)))
    assert_same(merge(a, b), merge(b, a))
    assert_same(merge(a, empty(spec)), a)
    assert_formula(plan, merge(merge(a, b), c), events)


@laws
@given(cases(), st.integers(0, 48 * HOUR_MS), st.integers(0, 48 * HOUR_MS))
def test_decay_composes_and_touches_masses_only(case, first_ms, second_ms):
    plan, events = case
    counts = fold(empty(spec_of(plan)), events)
    end_ms = counts.reference_ms + first_ms + second_ms
    assert_same(decay(decay(counts, counts.reference_ms + first_ms), end_ms), decay(counts, end_ms))
    kept = np.isin(counts.code_N, decay(counts, end_ms).code_N)
    np.testing.assert_array_equal(decay(counts, end_ms).net_N, counts.net_N[kept])


@laws
@given(cases(), st.integers(0, 2 * HOUR_MS))
def test_reading_is_the_sum_at_that_time(case, wait_ms):
    plan, events = case
    counts = fold(empty(spec_of(plan)), events)
    now_ms = counts.reference_ms + wait_ms
    wanted = direct(plan, events, now_ms)
    cell_CQ = np.arange(FEW_CELLS).reshape(-1, 1).astype(np.uint16)
    nothing = [0.0] * len(plan.half_life_ms)
    expected = [wanted.get(cell, (nothing,))[0] for cell in range(FEW_CELLS)]
    np.testing.assert_allclose(read(counts, cell_CQ, now_ms), expected, rtol=1e-5, atol=1e-28)


@laws
@given(st.lists(st.integers(0, 28 * 24 * HOUR_MS), min_size=1, max_size=5), st.data())
def test_a_cell_whose_event_was_retracted_is_absent_in_any_order_and_batching(times, data):
    plan = make_plan(fields=1, rates=5)
    rows = [(1 + cell, time, 1.5) for cell, time in enumerate(times)]
    order = [*rows, *((cell, time, -weight) for cell, time, weight in data.draw(st.permutations(rows)))]
    events = CountedEvents(
        cell_NQ=np.array([[row[0]] for row in order], np.uint16),
        time_ms_N=np.array([START_MS + row[1] for row in order], np.int64),
        weight_N=np.array([row[2] for row in order], np.float32),
    )
    cuts = sorted(data.draw(st.lists(st.integers(0, len(order)), max_size=6)))
    counts = fold_batches(plan, events, cuts)
    assert len(counts.code_N) == 0
    assert counts.count == len(order)


@pytest.mark.parametrize("half_lives", [10, 101, 145, 1_000, 100_000])
def test_after_many_half_lives_old_counts_are_what_the_formula_says_and_new_ones_are_whole(half_lives):
    plan = make_plan(fields=1, rates=5)
    cell_NQ, weight_N = np.array([[5], [6], [5], [9]], np.uint16), np.array([3.0, 2.0, 0.25, 1.0], np.float32)
    later_ms = START_MS + half_lives * HOUR_MS
    events = CountedEvents(
        cell_NQ=cell_NQ, time_ms_N=np.array([START_MS, START_MS, later_ms, later_ms]), weight_N=weight_N
    )
    wanted = direct(plan, events, later_ms)
    for counts in (delta(spec_of(plan), events), fold_batches(plan, events, [1, 2]), fold_batches(plan, events, [3])):
        assert_formula(plan, counts, events)
        # 6 was met long ago alone, 5 long ago and now.
        assert read(counts, np.array([[9]], np.uint16), later_ms).tolist() == [[1.0] * 5]
        found = read(counts, np.array([[5], [6], [7]], np.uint16), later_ms)
        np.testing.assert_allclose(found, [wanted[5][0], wanted[6][0], [0.0] * 5], rtol=1e-5, atol=1e-29)
    waited = fold(empty(spec_of(plan)), take(events, slice(0, 2)))
    found = read(waited, np.array([[5], [6]], np.uint16), later_ms)
    left_R = [1.0 if h is None else 0.5 ** (half_lives * HOUR_MS / h) for h in plan.half_life_ms]
    np.testing.assert_allclose(found, np.outer([3.0, 2.0], left_R), rtol=1e-5, atol=1e-29)


def test_an_event_without_a_cell_moves_the_reference_time_and_no_count():
    plan = make_plan(fields=1)
    first = CountedEvents(
        cell_NQ=np.array([[5]], np.uint16), time_ms_N=np.array([START_MS]), weight_N=np.ones(1, np.float32)
    )
    unknown = CountedEvents(
        cell_NQ=np.array([[NO_CELL]], np.uint16),
        time_ms_N=np.array([START_MS + HOUR_MS]),
        weight_N=np.ones(1, np.float32),
    )
    counts = fold(fold(empty(spec_of(plan)), first), unknown)
    assert (counts.reference_ms, counts.count, counts.code_N.tolist()) == (START_MS + HOUR_MS, 2, [5])
    assert counts.mass_NPR.tolist() == [[[0.5]]]


def test_a_value_has_one_cell_and_another_in_each_field():
    plan = make_plan(fields=2)
    a, missing, empty_text, again = plan.cells_of("item_id", ["a", None, "", "a"], [0] * 4).tolist()
    assert (missing, empty_text, again) == (NO_CELL, NO_CELL, a)
    names = [f"v{n}" for n in range(2000)]
    item, category = (plan.cells_of(field, names, [0] * 2000) for field in plan.fields)
    assert NO_CELL < min(category) <= max(category) < min(item)
    # As many different cells as 2,000 draws of seven eighths of 65,535 give, to five standard deviations.
    assert 1965 - 30 <= len(set(item.tolist())) <= 2000


@pytest.mark.parametrize("fields", [["item_id"], ["a"], ["a", "b"], ["b", "item_id", "a"], ["item_id", *"abcdefgh"]])
@pytest.mark.parametrize("cells", [73, 1000, BEYOND])
def test_the_cells_of_fields_are_apart_and_all_are_used(fields, cells):
    plan = CountPlan(fields=fields, half_life_ms=[None], cells=cells)
    values = [f"v{n}" for n in range(30 * cells if cells < BEYOND else 2000)]
    found = [set(plan.cells_of(field, values, [0] * len(values)).tolist()) for field in fields]
    assert sum(map(len, found)) == len(set().union(*found))
    assert set().union(*found) <= set(range(1, cells))
    if cells == 1000:
        # What is left over by the division, at most.
        assert len(set().union(*found)) >= cells - 1 - len(fields)


def test_cells_are_the_same_on_every_machine_and_in_every_version():
    assert make_plan().cells_of("item_id", ["i1", "i2"], [0, 0]).tolist() == [60078, 56864]


def test_known_values_have_cells_of_their_own_as_long_as_there_are_enough():
    plan = make_plan(cells=1 + 800)
    names = [f"i{n}" for n in range(1_000)]
    cell = plan.cells_of("item_id", names, range(1, 1_001))
    # 800 cells less an eighth, for the other field.
    assert len(set(cell[:700].tolist())) == 700
    assert cell[700:].tolist() == cell[:300].tolist()
    assert plan.cells_of("item_id", names[5:6], [0]) != cell[5]


def test_what_fields_of_few_values_do_not_need_is_left_to_items():
    plan = msgspec.structs.replace(make_plan(fields=3, cells=1 + 800), known=[770, 12, 1])
    item = plan.cells_of("item_id", [f"i{n}" for n in range(770)], range(1, 771)).tolist()
    category = plan.cells_of("category", [f"c{n}" for n in range(12)], range(1, 13)).tolist()
    (brand,) = plan.cells_of("brand", ["b"], [1]).tolist()
    assert len({*item, *category, brand}) == 770 + 12 + 1
    assert plan.cells_of("category", [f"later{n}" for n in range(500)], [0] * 500).max() < min(item)
    # Many values do not take more than they have without being known.
    many = msgspec.structs.replace(plan, known=[5, 700, 0])
    assert len(set(many.cells_of("category", [f"c{n}" for n in range(700)], range(1, 701)).tolist())) == 50
    assert many.cells_of("brand", ["later"], [0]) != NO_CELL
    with pytest.raises(ValueError, match="2 numbers of known values for 3 counted fields"):
        msgspec.structs.replace(plan, known=[1, 2])


def small_counter() -> Counter:
    """Items i0 to i19 of three categories, counted with a half-life of an hour and without end."""
    plan, numbers = make_plan(fields=2, rates=2), range(20)
    cells = [
        plan.cells_of("item_id", ["", *(f"i{n}" for n in numbers)], range(21)),
        plan.cells_of("category", ["", *(f"c{n % 3}" for n in numbers)], [0, *(1 + n % 3 for n in numbers)]),
    ]
    return Counter(plan=plan, cell_MQ=np.stack(cells, axis=1))


def test_counts_of_a_history_are_the_sum():
    item_N = np.array([1, 1, 4, 0, 2])
    time_N, asked = START_MS + np.arange(5) * HOUR_MS, Asked(5, START_MS + 5 * HOUR_MS, np.array([1, 4, 7, 3, 0]))
    (found,) = small_counter().of_timeline(item_N, time_N, np.ones(5, np.float32), [asked])
    # i0, i0, i3, unknown, i1: categories c0, c0, c0, none, c1. The first half-life is an hour, the second never.
    decayed = [2.0**-5 + 2.0**-4, 2.0**-3, 2.0**-1]
    category = [2.0**-5 + 2.0**-4 + 2.0**-3, 3.0]
    wanted = [[decayed[0], 2.0, *category], [decayed[1], 1.0, *category], [0, 0, *category], [0, 0, 0, 0], [0, 0, 0, 0]]
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


@st.composite
def timelines(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, list[Asked]]:
    """Events in the order of a log, some late and some retracted, and what is asked at some of them, in any order."""
    n = draw(st.integers(0, 12))
    item_N = draw(hnp.arrays(np.int64, n, elements=st.integers(0, 20)))
    time_N = draw(hnp.arrays(np.int64, n, elements=st.integers(START_MS, START_MS + 900 * HOUR_MS)))
    weight_N = draw(hnp.arrays(np.float32, n, elements=st.sampled_from([0.5, 1.0, 2.0])))
    taken_back = draw(st.lists(st.integers(0, n - 1), unique=True, max_size=3)) if n else []
    at = [*range(n), *taken_back]
    sign_N = np.array([1.0] * n + [-1.0] * len(taken_back), np.float32)
    asked = [
        Asked(end, START_MS + 900 * HOUR_MS + wait, np.array(candidates))
        for end, wait, candidates in draw(
            st.lists(
                st.tuples(
                    st.integers(0, len(at)),
                    st.integers(0, 50 * HOUR_MS),
                    st.lists(st.integers(0, 20), min_size=1, max_size=5),
                ),
                min_size=1,
                max_size=4,
            )
        )
    ]
    return item_N[at], time_N[at], weight_N[at] * sign_N, asked


@laws
@given(timelines())
def test_counts_along_a_timeline_are_those_of_the_rows_of_its_parts(case):
    item_N, time_N, weight_N, asked = case
    counter = small_counter()
    found = counter.of_timeline(item_N, time_N, weight_N, asked)
    for (end, now_ms, candidate_C), count_CX in zip(asked, found, strict=True):
        events = CountedEvents(cell_NQ=counter.cell_MQ[item_N[:end]], time_ms_N=time_N[:end], weight_N=weight_N[:end])
        row = fold(empty(spec_of(counter.plan)), events)
        # What cancelled is nothing in a row, and rounding here.
        np.testing.assert_allclose(
            count_CX,
            read(row, counter.cell_MQ[candidate_C], now_ms),
            rtol=1e-5,
            atol=1e-5 * np.abs(weight_N).max(initial=0),
        )


def test_exact_cells_collide_with_nothing_and_count_as_a_sketch_without_collisions():
    plan, fields = make_plan(fields=2, rates=2), ["item_id", "brand", "category"]
    feature_MF = np.array([[0, 0, 0], *([n, 1 + n % 5, 1 + n % 3] for n in range(1, 21))])
    feature_MF[7, 2] = 0
    cell_MQ = exact_cells(feature_MF, fields, plan)
    assert (cell_MQ[0] == NO_CELL).all()
    assert cell_MQ[7, 1] == NO_CELL
    values = {(q, int(feature_MF[m, f])): int(cell_MQ[m, q]) for m in range(1, 21) for q, f in enumerate((0, 2))}
    known = {cell for (_, value), cell in values.items() if value > 0}
    assert len(known) == 20 + 3
    assert NO_CELL not in known
    rng = np.random.default_rng(0)
    item_N, time_N = rng.integers(0, 21, 60), START_MS + np.sort(rng.integers(0, 99 * HOUR_MS, 60))
    asked = [Asked(60, START_MS + 100 * HOUR_MS, np.arange(21))]
    names = [["", *(f"i{n}" for n in range(1, 21))], [f"c{v}" if v else "" for v in feature_MF[:, 2]]]
    hashed = np.stack([plan.cells_of(f, n, [0] * len(n)) for f, n in zip(plan.fields, names, strict=True)], axis=1)
    found, wanted = (
        Counter(plan=plan, cell_MQ=cells).of_timeline(item_N, time_N, np.ones(60, np.float32), asked)[0]
        for cells in (cell_MQ, hashed)
    )
    np.testing.assert_array_equal(found, wanted)
    assert (found > 0).any(axis=0).all()


@pytest.mark.parametrize(("fields", "lives", "cells"), [([], [None], 9), (["a"], [], 9), (["a"], [1.0], 1)])
def test_a_plan_that_counts_nothing_is_refused(fields, lives, cells):
    with pytest.raises(ValueError, match=r"field and a half-life|cells"):
        CountPlan(fields=fields, half_life_ms=lives, cells=cells)


def dense_sketch_error(distinct: int, size_bytes: int, depth: int, rng: np.random.Generator) -> float:
    """Share of items never met to which a dense count-min sketch of this depth gives a count."""
    width = max(1, size_bytes // 4 // depth)
    rows = [set(rng.integers(0, width, distinct).tolist()) for _ in range(depth)]
    strangers = rng.integers(0, width, (20_000, depth))
    return float(np.mean([all(c in row for c, row in zip(cells, rows, strict=True)) for cells in strangers.tolist()]))


@pytest.mark.parametrize("distinct", [50, 500, 5_000])
def test_fewer_strangers_are_taken_for_known_than_by_a_dense_sketch_of_as_many_bytes(distinct):
    """The choice of form. `pytest tests/models/test_counts.py -k strangers -s` shows the figures."""
    rng, plan = np.random.default_rng(distinct), make_plan(fields=1)
    numbers = range(distinct + 20_000)
    cell = plan.cells_of("item_id", [f"i{n}" for n in numbers], [0] * len(numbers))
    events = CountedEvents(
        cell_NQ=cell[:distinct, None], time_ms_N=np.full(distinct, START_MS), weight_N=np.ones(distinct, np.float32)
    )
    counts = fold(empty(spec_of(plan)), events)
    size_bytes = len(counts.code_N) * (2 + 4 + 4)
    error = float((read(counts, cell[distinct:, None], START_MS) > 0).mean())
    dense = {
        (size, depth): dense_sketch_error(distinct, size, depth, rng)
        for size in (1024, 4096, size_bytes)
        for depth in (1, 2, 3)
    }
    print(f"{distinct} items, {size_bytes} bytes: {error:.4f};", {k: round(v, 3) for k, v in dense.items()})
    assert error < 1.3 * distinct / BEYOND + 1e-3
    assert error < min(dense.values())
