"""`vql bench train`: that it takes real steps and gives every figure."""

from __future__ import annotations

import json

import pytest

from tests.jobs.commands import vql


@pytest.mark.slow
def test_every_length_has_its_cost(tmp_path):
    vql("bench", "train", "--quick", "--output", tmp_path / "train.json")
    figures = json.loads((tmp_path / "train.json").read_text())
    for side in ("vql", "full"):
        assert list(figures[side]) == ["50", "200"]
        for cost in figures[side].values():
            assert cost["ms_per_impression"] > 0
            assert cost["peak_mb"] > 50
            assert cost["steps"] >= 2
    assert figures["growth"] > 0
