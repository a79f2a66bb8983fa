"""`vql release`: it teaches, says what it did, and fails with the exit codes of all else."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from jobs.releases.states import State
from jobs.releases.table import read_releases
from models.checkpoint import Checkpoint
from tests.jobs.commands import assert_one_line
from tests.jobs.releases.way import take_live, take_to_backfilled, take_to_shadow
from tests.jobs.serving.shop import user_ids

STEPS = {
    "list": ["--state", "--json", "--history", "Behind"],
    "add": ["--releases", "trained"],
    "gate": ["--margin", "--force", "REASON", "--before-ms", "Exit codes: 0", "8 refused", "interval"],
    "backfill": ["--log", "--state", "stream"],
    "shadow": ["--state", "promoted"],
    "promote": ["--note", "stands by"],
    "rollback": ["does not flip back"],
    "retire": ["--idle-s", "End its stream before"],
}


@pytest.fixture
def options(table: Path, store: StoreHandle) -> list[object]:
    return ["--releases", table, "--state", store.state]


def test_help_teaches_the_way_and_each_step(vql) -> None:
    said = vql("release", "--help")
    assert said.code == 0
    way = [
        said.out.index(f"{step} ") for step in ("add", "gate", "backfill", "shadow", "promote", "rollback", "retire")
    ]
    assert way == sorted(way)
    for step, words in STEPS.items():
        said = vql("release", step, "--help")
        assert said.code == 0
        text = " ".join(said.out.replace("│", " ").split())
        assert [word for word in [*words, f"Example: vql release {step}"] if word not in text] == [], step
        assert step == "list" or "--dry-run" in text


@pytest.mark.slow
def test_a_rollback_loads_nothing_that_takes_its_time(table: Path) -> None:
    take_live(table, "a" * 32, Path("/a"))
    take_live(table, "b" * 32, Path("/b"))
    program = f"""
import sys
from jobs.cli import main
sys.argv = ["vql", "release", "rollback", "b", "--releases", {str(table)!r}]
try:
    main()
except SystemExit:
    pass
print("LOADED", [name for name in ("pyspark", "torch", "feast", "sklearn", "apache_beam") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("LOADED []\n"), done.stdout
    assert read_releases(table).live_id == "a" * 32


def test_the_steps_say_what_they_did_and_a_dry_run_what_they_would(
    vql, first: Checkpoint, second: Checkpoint, table: Path, options
) -> None:
    for checkpoint in (first, second):
        said = vql("release", "add", checkpoint.path, "--releases", table)
        assert (said.code, said.out) == (0, f"release {checkpoint.checkpoint_id} is trained\n")
    said = vql("release", "add", first.path, "--releases", table)
    assert (said.code, said.out) == (0, f"nothing to do: release {first.checkpoint_id} is trained\n")
    take_live(table, first.checkpoint_id, first.path)
    take_to_backfilled(table, second.checkpoint_id, second.path)
    assert f"release {second.checkpoint_id} is shadow" in vql("release", "shadow", second.path, *options).out
    said = vql("release", "promote", second.checkpoint_id[:6], *options, "--dry-run")
    wanted = f"release {first.checkpoint_id} would be standby\nrelease {second.checkpoint_id} would be live\n"
    assert (said.code, said.out) == (0, wanted)
    assert read_releases(table).live_id == first.checkpoint_id
    said = vql("release", "promote", second.checkpoint_id[:6], *options, "--note", "[b]tuesday")
    assert f"release {second.checkpoint_id} is live: [b]tuesday" in said.out
    said = vql("release", "rollback", second.checkpoint_id, "--releases", table, "--note", "clicks are down")
    assert f"release {first.checkpoint_id} is live: clicks are down" in said.out
    said = vql("release", "rollback", second.checkpoint_id, "--releases", table)
    assert (said.code, said.out) == (0, f"nothing to do: release {second.checkpoint_id} is standby\n")
    said = vql("release", "retire", second.checkpoint_id, *options, "--idle-s", 0)
    assert said.out == f"release {second.checkpoint_id} is retired\n{len(user_ids())} rows deleted\n"


def test_list_is_a_table_for_people_and_lines_for_programs(
    vql, first: Checkpoint, second: Checkpoint, table: Path, options, tmp_path: Path
) -> None:
    assert "no releases: vql release add makes a checkpoint one" in vql("release", "list", "--releases", table).out
    take_live(table, first.checkpoint_id, first.path)
    take_to_shadow(table, second.checkpoint_id, second.path)
    said = vql("release", "list", *options)
    assert (said.code, said.err) == (0, "")
    lines = [line for line in said.out.splitlines() if any(c.checkpoint_id[:12] in line for c in (first, second))]
    assert [word for word in ("live", f" {len(user_ids())} ", "judged") if word not in said.out] == ["judged"]
    assert ("live" in lines[0], "shadow" in lines[1]) == (True, True)

    found = [json.loads(line) for line in vql("release", "list", *options, "--json").out.splitlines()]
    assert [(f["checkpoint_id"], f["state"], f["rows"], f["behind"]) for f in found] == [
        (first.checkpoint_id, "live", len(user_ids()), 0),
        (second.checkpoint_id, "shadow", len(user_ids()), 0),
    ]
    history = vql("release", "list", "--releases", table, "--json", "--history").out.splitlines()
    states = ["trained", "gated", "backfilled", "shadow"]
    assert [json.loads(line)["state"] for line in history] == [*states, "live", *states]
    assert "judged elsewhere" in [json.loads(line)["note"] for line in history]
    shown = vql("release", "list", "--releases", table, "--history").out
    assert [shown.count(c.checkpoint_id[:12]) for c in (first, second)] == [5, 4]


def test_list_goes_without_a_store_that_cannot_be_asked(
    vql, first: Checkpoint, table: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    take_live(table, first.checkpoint_id, first.path)
    monkeypatch.setenv("VQL_REDIS_URL", "redis://127.0.0.1:1/0")
    monkeypatch.setenv("VQL_REDIS_RETRIES", "0")
    said = vql("release", "list", "--releases", table, "--state", tmp_path, "--json")
    assert said.code == 0
    assert "the store cannot be asked" in said.err
    assert json.loads(said.out)["rows"] is None


def test_what_cannot_be_done_is_one_line_with_the_exit_code_of_its_kind(
    vql, first: Checkpoint, second: Checkpoint, table: Path, options, store: StoreHandle, tmp_path: Path
) -> None:
    assert_one_line(vql("release", "promote", "a", *options), 2, "'a' names 0 checkpoints", "vql release add makes one")
    assert_one_line(vql("release", "add", tmp_path, "--releases", table), 3, "is no checkpoint")
    take_live(table, first.checkpoint_id, first.path)
    take_to_shadow(table, second.checkpoint_id, second.path)
    assert_one_line(vql("release", "retire", first.checkpoint_id, *options), 2, "is live: rankers read it")
    gate = ["gate", second.path, "--releases", table, "--log", tmp_path, "--work", tmp_path, "--force", " "]
    assert_one_line(vql("release", *gate), 2, "--force needs a reason")
    store.open().delete_checkpoint(second.checkpoint_id)
    assert_one_line(vql("release", "promote", second.path, *options), 5, "StoreError", "neither a backfill nor")
    newest = max((table / "_delta_log").glob("*.json"))
    newest.write_text("{")
    assert_one_line(vql("release", "list", "--releases", table), 5, "StoreError", f"the releases at {table} cannot be")
    assert vql("release", "fly").code == 2
    assert State.SHADOW == "shadow"
