"""The row: however the log is cut into batches, and however often it is replayed, the row is the same."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from models.cache import CacheSpec, delta
from models.counts import CountPlan
from models.errors import ForeignRowError, WireError
from models.item_table import ItemTable
from models.row import (
    Fold,
    Left,
    Row,
    RowBytes,
    advance,
    advance_users,
    decode_row,
    encode_row,
    new_row,
    whole_cache,
    whole_counts,
)
from models.wire import RECENT, Stamp, decode_counts, encode_folded, pack_recent, recent_offsets
from tests.models.test_cache import HOUR_MS, START_MS, make_spec
from tests.models.test_counts import assert_formula as assert_counts_formula
from tests.models.test_counts import assert_same as assert_same_counts
from tests.small import random_events, small_checkpoint
from tests.twin import assert_formula, assert_same_cache

WINDOWS = [0, 1, 2, 4, 64]
ITEMS, ACTIONS = 9, 3
POSITION = Stamp(epoch=0, partition=0, offset=0)

laws = settings(max_examples=50, deadline=None)


COUNTS = CountPlan(fields=["item_id", "category"], half_life_ms=[float(HOUR_MS), None])


def make_fold(window: int, spec: CacheSpec | None = None, counting: CountPlan | None = COUNTS) -> Fold:
    spec = spec or make_spec(groups=2, heads_per_group=2)
    rng = np.random.default_rng(0)
    table = ItemTable(
        checkpoint_id=spec.checkpoint_id,
        index={f"i{n}": n for n in range(1, ITEMS)},
        code_MG=rng.integers(0, spec.codewords, (ITEMS, spec.groups)).astype(np.uint16),
        feature_MF=np.arange(ITEMS).reshape(-1, 1),
        cell_MQ=np.stack([np.arange(ITEMS), (np.arange(ITEMS) + 2) // 3], axis=1).astype(np.uint16),
        value_MHD=rng.normal(size=(ITEMS, spec.heads, spec.value_width)).astype(np.float32),
        action_value_AHD=rng.normal(size=(ACTIONS, spec.heads, spec.value_width)).astype(np.float32),
    )
    return Fold(spec=spec, window=window, table=table, counting=counting)


def make_log(count: int, seed: int = 0, gap: int = 3) -> np.ndarray:
    """One user's events: rising offsets with gaps, late and repeated times."""
    rng = np.random.default_rng(seed)
    return pack_recent(
        offset_N=np.cumsum(rng.integers(1, gap + 1, count)) - 1,
        time_ms_N=START_MS + rng.integers(0, 50, count) * HOUR_MS,
        action_N=rng.integers(0, ACTIONS, count),
        item_N=rng.integers(0, ITEMS, count),
        weight_N=rng.uniform(0.5, 2.0, count).astype(np.float32),
        event_hash_N=rng.integers(0, 2**32, count),
    )


def advance_all(using: Fold, batches: list[np.ndarray]) -> Row:
    row = new_row(using.spec, 0, 0)
    for batch in batches:
        row, left = advance(row, batch, POSITION, using)
        assert left.skipped == 0
    return row


def assert_same_row(found: Row, wanted: Row) -> None:
    assert (found.stamp, found.folded_stamp, found.count) == (wanted.stamp, wanted.folded_stamp, wanted.count)
    np.testing.assert_array_equal(found.recent, wanted.recent)
    assert_same_cache(found.folded, wanted.folded)
    spec = COUNTS.spec(found.spec.checkpoint_id)
    assert_same_counts(decode_counts(found.folded_data, spec), decode_counts(wanted.folded_data, spec))


@laws
@given(st.sampled_from(WINDOWS), st.integers(0, 40), st.lists(st.integers(0, 40), max_size=6))
def test_how_the_log_is_cut_into_batches_does_not_matter(window, count, cuts):
    using, log = make_fold(window), make_log(count)
    assert_same_row(
        advance_all(using, np.split(log, sorted(min(cut, count) for cut in cuts))),
        advance_all(using, [log[n : n + 1] for n in range(count)]),
    )


@laws
@given(st.sampled_from(WINDOWS), st.integers(0, 300))
def test_recent_holds_at_most_two_windows_and_folded_the_rest(window, count):
    using, log = make_fold(window), make_log(count)
    row = advance_all(using, [log])
    assert len(row.recent) == count if count < 2 * window else window <= len(row.recent) <= max(0, 2 * window - 1)
    assert window == 0 or row.folded.count % window == 0
    assert row.count == count
    np.testing.assert_array_equal(row.recent, log[count - len(row.recent) :])
    offsets = [-1, *recent_offsets(log).tolist()]
    assert row.stamp.offset == offsets[-1]
    assert row.folded_stamp.offset == offsets[row.folded.count]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("batch", [1, 7, 300])
def test_the_whole_cache_is_the_formula_over_every_event(window, batch):
    using, log = make_fold(window), make_log(200)
    row = advance_all(using, [log[n : n + batch] for n in range(0, 200, batch)])
    whole = whole_cache(row, using)
    assert_same_cache(whole, delta(using.spec, using.encode(log)))
    assert_formula(whole, using.encode(log))
    counts = whole_counts(row, using)
    assert counts is not None
    assert_counts_formula(COUNTS, counts, using.encode_counted(log))
    assert counts.reference_ms == whole.reference_ms
    assert len(counts.code_N) > 5


def test_retracted_events_leave_no_cell_in_the_row():
    using, log = make_fold(2), make_log(20, gap=1)
    # Of one time: what is left of an event beside a retracted one ten million times heavier is noise, as in the cache.
    log["time"] = log["time"][0]
    undo = log.copy()
    undo["position"] += np.uint64(1000 << 16)
    undo["weight"] *= -1
    row = advance_all(using, [log, undo])
    counts = whole_counts(row, using)
    assert counts is not None
    assert (len(counts.code_N), counts.count) == (0, 40)
    assert len(decode_counts(row.folded_data, counts.spec).code_N) > 0


@pytest.mark.parametrize("window", WINDOWS)
def test_a_tombstone_erases_the_counts_before_it_and_leaves_those_after(window):
    using, log = make_fold(window), make_log(40, gap=1)
    log["weight"][25] = 0
    row = advance_all(using, [log[:10], log[10:27], log[27:]])
    counts = whole_counts(row, using)
    assert counts is not None
    assert_counts_formula(COUNTS, counts, using.encode_counted(log[26:]))
    gone = advance_all(using, [log[:26]])
    erased = whole_counts(gone, using)
    assert erased is not None
    assert (len(erased.code_N), erased.count) == (0, 0)


@laws
@given(st.sampled_from(WINDOWS), st.lists(st.integers(1, 39), max_size=6), st.lists(st.integers(0, 19), max_size=5))
def test_counts_of_a_row_are_the_formula_however_its_log_with_retractions_is_cut(window, cuts, taken_back):
    using, log = make_fold(window), make_log(40, gap=1)
    # Retractions follow their events: the second half takes back some of the first.
    for n, event in enumerate(sorted(set(taken_back))):
        position = log["position"][20 + n] & ~np.uint64(0xFFFF) | log["position"][event] & np.uint64(0xFFFF)
        log[20 + n] = log[event]
        log["position"][20 + n], log["weight"][20 + n] = position, -log["weight"][event]
    bounds = [0, *sorted(set(cuts)), 40]
    row = advance_all(using, [log[a:b] for a, b in pairwise(bounds)])
    counts = whole_counts(row, using)
    assert counts is not None
    assert_counts_formula(COUNTS, counts, using.encode_counted(log))


def test_a_checkpoint_without_counts_has_rows_without_them():
    counted, plain = make_fold(2), make_fold(2, counting=None)
    log = make_log(20)
    row = advance_all(plain, [log])
    assert whole_counts(row, plain) is None
    assert row.folded_data == encode_folded(row.folded, row.folded_stamp)
    assert len(advance_all(counted, [log]).folded_data) > len(row.folded_data)


@laws
@given(st.sampled_from(WINDOWS), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 30)), max_size=6))
def test_replays_of_any_part_of_the_log_change_nothing(window, replays):
    using, log = make_fold(window), make_log(30)
    row, done = new_row(using.spec, 0, 0), 0
    for start, end in [*replays, (0, 30)]:
        start, end = min(start, done), max(start, end)
        row, left = advance(row, log[start:end], POSITION, using)
        assert left.skipped == min(done, end) - start
        done = max(done, end)
    assert_same_row(row, advance_all(using, [log]))


@pytest.mark.parametrize("window", WINDOWS)
def test_a_row_without_new_events_comes_back_as_the_same_object(window):
    using, log = make_fold(window), make_log(20)
    row = advance_all(using, [log])
    assert advance(row, log, POSITION, using)[1] == Left(skipped=20)
    assert advance(row, log, POSITION, using)[0] is row
    assert advance(row, log[:0], POSITION, using) == (row, Left())


def test_events_at_or_below_the_stamp_are_skipped_and_counted():
    using, log = make_fold(4), make_log(10, gap=1)
    row = replace(new_row(using.spec, 0, 0), stamp=Stamp(epoch=0, partition=0, offset=6))
    row, left = advance(row, log, POSITION, using)
    assert left.skipped == 7
    assert recent_offsets(row.recent).tolist() == [7, 8, 9]


def test_a_new_epoch_starts_its_offsets_again_and_an_old_one_is_skipped():
    using, log = make_fold(4), make_log(3, gap=1)
    row = advance_all(using, [log])
    row, left = advance(row, log, Stamp(epoch=1, partition=5, offset=0), using)
    assert (left.skipped, row.count) == (0, 6)
    assert row.stamp == Stamp(epoch=1, partition=5, offset=2)
    again, left = advance(row, make_log(100), POSITION, using)
    assert (left.skipped, again) == (100, row)


def test_users_of_several_partitions_are_advanced_together_and_keep_theirs():
    using, log = make_fold(4), make_log(30, gap=1)
    rows = [new_row(using.spec, 0, partition) for partition in (7, 0, 3)]
    end_U = np.array([10, 10, 30])
    together = advance_users(rows, log, end_U, POSITION, using).rows
    assert [row.stamp.partition for row in together] == [7, 0, 3]
    for row, before, first, last in zip(together, rows, (0, 10, 10), end_U, strict=True):
        alone, _ = advance(before, log[first:last], replace(before.stamp, offset=0), using)
        assert_same_row(row, alone)
        assert encode_row(row) == encode_row(alone)


def test_what_is_folded_is_never_stamped_later_than_the_row():
    using, log = make_fold(2), make_log(3, gap=1)
    row = advance_all(using, [log])
    row, _ = advance(row, log[:1], Stamp(epoch=1, partition=0, offset=0), using)
    assert row.folded.count >= 2
    assert row.folded_stamp.order <= row.stamp.order


def test_a_repaired_row_keeps_its_revision():
    using, log = make_fold(1), make_log(6)
    row = advance_all(using, [log[:3]])
    row = replace(row, stamp=replace(row.stamp, revision=4))
    row, _ = advance(row, log, POSITION, using)
    assert row.stamp.revision == 4
    assert row.count == 6


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("count", [0, 1, 5, 200])
def test_a_row_comes_back_from_its_bytes_and_goes_on_as_before(window, count):
    using, log = make_fold(window), make_log(count + 20)
    row = advance_all(using, [log[:count]])
    found = decode_row(encode_row(row), using.spec)
    assert encode_row(found) == encode_row(row)
    assert_same_row(found, row)
    assert_same_row(advance(found, log, POSITION, using)[0], advance_all(using, [log[:count], log[count:]]))
    assert encode_row(row).size_bytes == len(encode_row(row).folded) + len(encode_row(row).recent)


def test_a_row_of_swapped_damaged_or_foreign_parts_is_refused():
    using = make_fold(2)
    data = encode_row(advance_all(using, [make_log(9)]))
    for wrong in (
        RowBytes(folded=data.recent, recent=data.folded),
        RowBytes(folded=data.folded[:-1], recent=data.recent),
        RowBytes(folded=data.folded, recent=b""),
    ):
        with pytest.raises(WireError):
            decode_row(wrong, using.spec)
    with pytest.raises(ForeignRowError):
        decode_row(data, make_spec(groups=2, heads_per_group=2, checkpoint_id="cd" * 16))


def test_a_new_row_is_complete_up_to_the_position_before_the_first():
    row = new_row(make_spec(), 2, 3)
    assert row.stamp == row.folded_stamp == Stamp(epoch=2, partition=3, offset=-1)
    assert (row.count, row.recent.dtype) == (0, RECENT)
    assert not row.stamp.covers(2, 0)
    assert row.stamp.covers(1, 10**9)


def test_events_are_encoded_by_item_and_action_of_a_real_checkpoint(tmp_path):
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    using = checkpoint.fold()
    events = random_events(30, unknown_share=0.3)
    log = pack_recent(
        offset_N=np.arange(30),
        time_ms_N=np.array([event.event_time_ms for event in events]),
        action_N=checkpoint.action_index([event.action for event in events]),
        item_N=using.table.lookup([event.item_id for event in events]),
        weight_N=np.array([event.weight for event in events], np.float32),
        event_hash_N=np.zeros(30, np.uint32),
    )
    encoded = using.encode(log)
    for n, event in enumerate(events):
        item = using.table.index.get(event.item_id, 0)
        action = checkpoint.manifest.actions.index(event.action) if event.action != "shout" else 0
        assert encoded.code_NG[n].tolist() == using.table.code_MG[item].tolist()
        wanted = using.table.value_MHD[item] + using.table.action_value_AHD[action]
        np.testing.assert_array_equal(encoded.value_NHD[n], wanted)
        assert (encoded.time_ms_N[n], encoded.weight_N[n]) == (event.event_time_ms, event.weight)
