"""`vql bench stream` on its own servers: that it runs, and that its figures keep to what their readers rely on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from tests.jobs.commands import assert_one_line
from tests.servers import missing


@pytest.mark.beam
@pytest.mark.slow
def test_a_small_run_gives_every_figure(vql, tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        missing("redis-server is not on the PATH")
    output = tmp_path / "made" / "stream.json"
    small = ("--quick", "--load", "skewed", "--events", "60000", "--freshness-s", "1", "--soak-s", "1")
    said = vql("bench", "stream", "--output", output, *small)
    assert said.code == 0, said.err
    figures = json.loads(output.read_text())
    for side in ("floor", "redis", "embedded"):
        assert figures[side]["events_per_s"] > 0
    assert figures["ratio_to_floor"].keys() == {"redis", "embedded"}
    assert 0 < figures["bytes_per_event"]["two_part"] < figures["bytes_per_event"]["whole"]
    assert figures["freshness"].keys() == {"0.1", "0.5", "0.8"}
    for fresh in figures["freshness"].values():
        assert 0 < fresh["p50_s"] <= fresh["p99_s"] <= fresh["max_s"]
        assert fresh["lost"] == 0
    assert 0 < figures["rss_mb"]["start"] <= figures["rss_mb"]["max"] >= figures["rss_mb"]["end"]
    assert figures["poison"]["share"] == 0.01
    assert figures["rows_compared"] > 100
    assert figures["machine"]["cores"] >= 1
    assert {"kafka", "redis-server", "apache-beam"} <= figures["versions"].keys()
    assert figures["config"]["sizes"]["window"] == 64
    assert figures["seconds"] > 0
    assert "redis / floor" in said.out


def test_a_machine_without_redis_is_told_so_in_one_line(vql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.local_servers.shutil.which", lambda name: None)
    said = vql("bench", "stream", "--output", tmp_path / "out.json")
    assert_one_line(said, 6, "redis-server is not on the PATH")
    assert not (tmp_path / "out.json").exists()


def test_the_help_says_what_is_measured() -> None:
    said = CliRunner().invoke(app, ["bench", "stream", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert [word for word in ("floor", "freshness", "--quick", "--soak-s", "--output") if word not in said] == []
