"""`vql bench read` on its own server: that it runs, compares, and gives the figures that its readers rely on."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from jobs.bench_load import random_checkpoint
from jobs.bench_read import BATCHES, CODEWORDS, FEAST, FEAST_TENSORS, FLOOR, READER
from jobs.bench_read_rows import EVENTS_MAX, EVENTS_MIN, realistic_rows
from models.checkpoint import Sizes
from tests.jobs.commands import assert_one_line
from tests.servers import missing


@pytest.mark.slow
def test_a_small_run_gives_every_figure(vql, tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        missing("redis-server is not on the PATH")
    output = tmp_path / "made" / "read.json"
    before = dict(os.environ)
    said = vql("bench", "read", "--output", output, "--users", "30", "--calls", "40")
    assert said.code == 0, said.err
    assert dict(os.environ) == before
    figures = json.loads(output.read_text())
    assert figures["ratios"].keys() == {str(batch) for batch in BATCHES} == {"1", "10", "100", "500"}
    for batch, ratios in figures["ratios"].items():
        sides = figures[batch]
        assert sides.keys() == {"raw", "reader", "feast", FEAST_TENSORS, CODEWORDS}
        for side in sides.values():
            assert 0 < side["p50_ms"] <= side["p99_ms"]
        assert ratios["reader_over_raw"] == pytest.approx(sides[READER]["p50_ms"] / sides[FLOOR]["p50_ms"], abs=0.01)
        assert ratios["feast_over_reader"] == pytest.approx(sides[FEAST]["p50_ms"] / sides[READER]["p50_ms"], abs=0.01)
    assert figures["rows_compared"] == 30
    assert 0 < figures["rows"]["bytes_p50"] <= figures["rows"]["bytes_p99"]
    assert figures["parts_of_100_users_ms"]["the whole read"] > 0
    assert figures["machine"]["cores"] >= 1
    assert {"redis-server", "hiredis", "feast"} <= figures["versions"].keys()
    assert figures["config"]["sizes"]["codewords"] == 256
    assert "reader / raw" in said.out


def test_the_rows_are_as_long_and_as_full_as_real_ones(tmp_path: Path) -> None:
    using = random_checkpoint(tmp_path / "c", Sizes()).fold()
    rows = realistic_rows(using, 20)
    counts = [row.count for row in rows.values()]
    assert min(counts) >= EVENTS_MIN * 0.99
    assert max(counts) <= EVENTS_MAX
    assert max(counts) > 10 * min(counts)
    shortest = min(rows.values(), key=lambda row: row.count)
    assert 300 < len(shortest.folded.code_N) < 1024
    assert 10_000 < np.median([row.size_bytes for row in rows.values()]) < 60_000


def test_a_machine_without_redis_is_told_so_in_one_line(vql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.local_servers.shutil.which", lambda name: None)
    assert_one_line(vql("bench", "read", "--output", tmp_path / "out.json"), 6, "redis-server is not on the PATH")
    assert not (tmp_path / "out.json").exists()
