"""`vql bench backfill` on its own cluster and server: that it runs, compares rows, and gives its figures."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from jobs.cli import app
from tests.jobs.commands import assert_one_line
from tests.jobs.processes import OUTPUT, start
from tests.servers import missing


@pytest.mark.spark
@pytest.mark.slow
def test_a_small_run_gives_every_figure(tmp_path: Path) -> None:
    if shutil.which("redis-server") is None:
        missing("redis-server is not on the PATH")
    output = tmp_path / "made" / "backfill.json"
    # A process of its own: the tests have a session of Spark in this one.
    running = start(["bench", "backfill", "--quick", "--output", output], tmp_path)
    assert running.wait() == 0, (tmp_path / OUTPUT).read_text()
    figures = json.loads(output.read_text())
    assert figures["fold"].keys() == {"20", "300"}
    for fold in figures["fold"].values():
        assert fold["ratio"] == pytest.approx(fold["task"] / fold["floor"])
    for side in ("job", "naive"):
        speed, events = figures[side], 300 * 20
        assert speed["events_per_s_per_core"] * figures["bench"]["executors"] == speed["events_per_s"]
        assert speed["events_per_s"] * speed["seconds"] == pytest.approx(events, rel=0.05)
    assert figures["rows_compared"] == 300
    assert figures["redis_us_per_row"] > 0
    assert figures["memory_mb"]["java"] > 100
    assert figures["memory_mb"]["python"] > 50
    assert {"pyspark", "redis-server", "java"} <= figures["versions"].keys()
    assert "task / floor" in (tmp_path / OUTPUT).read_text()


def test_a_machine_without_redis_is_told_so_in_one_line(vql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("jobs.local_servers.shutil.which", lambda name: None)
    said = vql("bench", "backfill", "--quick", "--output", tmp_path / "out.json")
    assert_one_line(said, 6, "redis-server is not on the PATH")
    assert not (tmp_path / "out.json").exists()


def test_the_help_says_what_is_measured() -> None:
    said = CliRunner().invoke(app, ["bench", "backfill", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    assert [word for word in ("floor", "naive", "memory_mb", "--executor-mb", "--output") if word not in said] == []
