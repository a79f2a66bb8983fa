"""Rows of the same events agree however their folds were cut, and each kind of difference is found and named."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from msgspec.structs import replace

from jobs.row_difference import (
    AGREES,
    COUNTS,
    DAMAGED,
    ENTRIES,
    FOLDED,
    FOREIGN,
    LATER_ITEMS,
    RECENT,
    STAMP,
    difference,
)
from models.checkpoint import Checkpoint
from models.item_table import UNKNOWN
from models.row import Fold, Row, RowBytes, advance, decode_row, encode_row, new_row
from models.wire import Stamp, decode_counts, encode_folded
from tests.pipelines.small_log import recent_of
from tests.small import HOUR_MS, random_events
from tests.small_ranker import COUNTS as COUNTED
from tests.small_ranker import scoring_checkpoint

TOLERANCE = 1e-4
EVENTS = 3000
START = Stamp(epoch=1, partition=1, offset=-1)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return scoring_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", counts=COUNTED)


@pytest.fixture(scope="module")
def using(checkpoint: Checkpoint) -> Fold:
    return checkpoint.fold()


@pytest.fixture(scope="module")
def events(checkpoint: Checkpoint) -> np.ndarray:
    return recent_of(checkpoint, random_events(EVENTS, users=1, seed=3), range(EVENTS))


def folded(events: np.ndarray, using: Fold, at_once: int = EVENTS) -> Row:
    row = new_row(using.spec, 1, 1)
    for start in range(0, len(events), at_once):
        row, _ = advance(row, events[start : start + at_once], START, using)
    return row


def with_retractions(events: np.ndarray) -> np.ndarray:
    """A third of the events is taken back by the one behind it."""
    events = events.copy()
    for n in range(1, len(events), 3):
        for name in ("time", "item"):
            events[name][n] = events[name][n - 1]
        events["weight"][n] = -events["weight"][n - 1]
    return events


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("at_once", [1, 7, 100])
def test_rows_of_the_same_events_agree_however_they_were_cut(events, using: Fold, at_once: int, back: bool) -> None:
    events = with_retractions(events) if back else events
    one, other = encode_row(folded(events, using, at_once)), encode_row(folded(events, using))
    assert one != other
    found = difference(one, other, using, TOLERANCE)
    assert found.what == AGREES
    assert 0 < found.error < TOLERANCE


def test_the_revision_is_not_of_the_log(events, using: Fold) -> None:
    row = folded(events, using)
    revised = replace(row, stamp=replace(row.stamp, revision=7))
    assert difference(encode_row(revised), encode_row(row), using, TOLERANCE) == (AGREES, 0.0)


@pytest.mark.parametrize("field", ["mass_NPR", "mean_NPRD", "net_N"])
@pytest.mark.parametrize("back", [False, True])
def test_one_wrong_number_of_one_entry_is_found(events, using: Fold, field: str, back: bool) -> None:
    row = folded(with_retractions(events) if back else events, using)
    cache = row.folded
    numbers = getattr(cache, field).copy()
    # Of the entry that weighs most, because beside retractions a light one may be a rounding error.
    flat = numbers.reshape(len(numbers), -1)
    flat[int(np.abs(cache.mass_NPR).max(axis=(1, 2)).argmax()), 0] += 1
    wrong = changed(row, dataclasses.replace(cache, **{field: numbers}), using)
    wanted = AGREES if back and field == "net_N" else ENTRIES
    assert difference(wrong, encode_row(row), using, TOLERANCE).what == wanted


def test_an_entry_that_is_nearly_forgotten_counts_as_much_as_a_fresh_one(events, using: Fold) -> None:
    # The only event of its codeword in the first group, a month before all others.
    code_N = using.table.code_MG[events["item"], 0]
    events = events[(code_N != code_N[0]) | (np.arange(len(events)) == 0)].copy()
    events["time"][0] -= np.uint64(30 * 24 * HOUR_MS << 16)
    row = folded(events, using)
    cache = row.folded
    mass = cache.mass_NPR.copy()
    light = np.unravel_index(np.where(mass > 0, mass, np.inf).argmin(), mass.shape)
    assert 0 < mass[light] < 1e-6
    mass[light] *= 1.01
    wrong = changed(row, dataclasses.replace(cache, mass_NPR=mass), using)
    found = difference(wrong, encode_row(row), using, TOLERANCE)
    assert (found.what, found.error) == (ENTRIES, pytest.approx(0.01, rel=0.01))


def test_what_a_retraction_leaves_of_a_light_mass_is_rounding(events, using: Fold) -> None:
    code_N = using.table.code_MG[events["item"], 0]
    events = events[(code_N != code_N[0]) | (np.arange(len(events)) == 0)][:100].copy()
    events["weight"] = 1.0
    # Two weeks and a half ago, then again, and that is taken back when it has long been folded.
    events["time"][0] = events["time"].max() - np.uint64(17 * 24 * HOUR_MS << 16)
    events["item"][[30, 90]] = events["item"][0]
    events["time"][90], events["weight"][90] = events["time"][30], -1.0
    one, other = encode_row(folded(events, using, 1)), encode_row(folded(events, using))
    assert difference(one, other, using, TOLERANCE).what == AGREES
    # It is more than rounding beside what is left.
    mass, whole = (decode_row(data, using.spec).folded.mass_NPR for data in (one, other))
    assert (np.abs(mass - whole) > TOLERANCE * np.abs(whole)).any()


def test_an_entry_that_is_gone_and_a_wrong_count_are_found(events, using: Fold) -> None:
    row, cache = folded(events, using), folded(events, using).folded
    kept = {name: getattr(cache, name)[1:] for name in ("code_N", "net_N", "mass_NPR", "mean_NPRD")}
    gone = changed(row, dataclasses.replace(cache, **kept), using)
    assert difference(gone, encode_row(row), using, TOLERANCE).what == ENTRIES
    counts = decode_counts(row.folded_data, using.count_spec)
    wrong = dataclasses.replace(counts, mass_NPR=counts.mass_NPR * np.float32(1.01))
    data = RowBytes(folded=encode_folded(cache, row.folded_stamp, wrong), recent=encode_row(row).recent)
    assert difference(data, encode_row(row), using, TOLERANCE).what == COUNTS


def test_a_number_that_is_none_is_found(events, using: Fold) -> None:
    row = folded(events, using)
    cache = row.folded
    mean = cache.mean_NPRD.copy()
    mean.flat[0] = np.nan
    wrong = changed(row, dataclasses.replace(cache, mean_NPRD=mean), using)
    assert difference(wrong, encode_row(row), using, TOLERANCE) == (ENTRIES, np.inf)


def test_what_must_be_exact_is_named_when_it_is_not(events, using: Fold, tmp_path) -> None:
    row = encode_row(folded(events, using))
    one_less = encode_row(folded(events[:-1], using))
    assert difference(one_less, row, using, TOLERANCE).what == STAMP
    other = events.copy()
    other["weight"][-1] += 1
    assert difference(encode_row(folded(other, using)), row, using, TOLERANCE).what == RECENT
    longer = dataclasses.replace(using, window=using.window + 1)
    assert difference(encode_row(folded(events, longer)), row, using, TOLERANCE).what == FOLDED
    cut = RowBytes(folded=row.folded[:-1], recent=row.recent)
    assert difference(cut, row, using, TOLERANCE).what == DAMAGED
    stranger = scoring_checkpoint(tmp_path / "other", seed=6, counts=COUNTED)
    foreign = recent_of(stranger, random_events(EVENTS, users=1, seed=3), range(EVENTS))
    found = difference(encode_row(folded(foreign, stranger.fold())), row, using, TOLERANCE)
    assert found.what == FOREIGN


def test_events_folded_before_their_item_was_known_are_no_fault_but_other_things_are(events, using: Fold) -> None:
    wanted = encode_row(folded(events, using))
    early = events.copy()
    early["item"][::2] = UNKNOWN
    row = folded(early, using)
    assert difference(encode_row(row), wanted, using, TOLERANCE, later_items=True).what == LATER_ITEMS
    assert difference(encode_row(row), wanted, using, TOLERANCE).what == RECENT
    # Never all of it is let pass: masses must add up, and a known item is not another one.
    wrong = changed(row, dataclasses.replace(row.folded, mass_NPR=row.folded.mass_NPR * np.float32(1.01)), using)
    assert difference(wrong, wanted, using, TOLERANCE, later_items=True).what == ENTRIES
    early["item"][-1] = early["item"][-1] % 40 + 1
    assert difference(encode_row(folded(early, using)), wanted, using, TOLERANCE, later_items=True).what == RECENT
    # And where it makes no difference, none is made.
    assert difference(wanted, wanted, using, TOLERANCE, later_items=True) == (AGREES, 0.0)


def changed(row: Row, cache, using: Fold) -> RowBytes:
    """The row with another folded part, whose checksum is right."""
    counts = decode_counts(row.folded_data, using.count_spec)
    return RowBytes(folded=encode_folded(cache, row.folded_stamp, counts), recent=encode_row(row).recent)
