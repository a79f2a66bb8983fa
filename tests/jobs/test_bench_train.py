"""`vql bench train`: that it takes real steps and gives every figure."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from jobs.cli import app


@pytest.mark.slow
def test_every_length_has_its_cost(tmp_path):
    said = CliRunner().invoke(app, ["bench", "train", "--quick", "--output", str(tmp_path / "train.json")])
    assert said.exit_code == 0, said.output
    figures = json.loads((tmp_path / "train.json").read_text())
    assert (tmp_path / "train.png").read_bytes().startswith(b"\x89PNG")
    for side in ("vql", "steady", "full"):
        assert list(figures[side]) == ["50", "200"]
        for cost in figures[side].values():
            assert cost["ms_per_impression"] > 0
            assert cost["peak_mb"] > 50
            assert cost["steps"] >= (1 if side == "steady" else 2)
        assert figures[f"{side}_growth"] > 0
