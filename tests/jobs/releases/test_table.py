"""A step is one commit: of two at once one judges anew, a kill leaves all or nothing; looking is cheap and right."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deltalake import DeltaTable

from jobs.releases import table as table_module
from jobs.releases.states import State, added, promoted, retired, rolled_back
from jobs.releases.table import is_releases, live_path, newest_release, read_releases, record
from models.errors import CheckpointError, InputError, StoreError
from tests.jobs.releases.contend import add, at_once, promote
from tests.jobs.releases.way import take_live, take_to_shadow


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "releases"


def test_what_is_recorded_is_read_and_nothing_more(table: Path) -> None:
    assert read_releases(table).entries == ()
    assert not is_releases(table)
    (entry,) = record(table, lambda now: added(now, "a", "/a"), "why [not]")
    assert is_releases(table)
    assert read_releases(table).entries == (entry,)
    assert (entry.state, entry.path, entry.note, entry.against) == (State.TRAINED, "/a", "why [not]", None)
    assert abs(entry.at_ms / 1000 - time.time()) < 60
    assert entry.by
    version = DeltaTable(table).version()
    assert record(table, lambda now: added(now, "a", "/a")) == []
    assert DeltaTable(table).version() == version


def test_of_a_table_the_live_one_is_meant_and_of_a_checkpoint_itself(table: Path, tmp_path: Path) -> None:
    assert live_path(tmp_path / "checkpoint") == tmp_path / "checkpoint"
    take_to_shadow(table, "a", Path("/a"))
    with pytest.raises(CheckpointError, match="is live; run vql release promote"):
        live_path(table)
    take_live(table, "b", Path("/b"))
    assert live_path(table) == Path("/b")


def test_a_dry_run_says_it_and_writes_nothing(table: Path) -> None:
    (entry,) = record(table, lambda now: added(now, "a", "/a"), dry_run=True)
    assert entry.state == State.TRAINED
    assert read_releases(table).entries == ()


def test_a_step_that_is_refused_writes_nothing(table: Path) -> None:
    record(table, lambda now: added(now, "a", "/a"))
    before = read_releases(table)
    with pytest.raises(InputError, match="cannot become live"):
        record(table, lambda now: promoted(now, "a"))
    assert read_releases(table) == before


def test_a_change_between_reading_and_writing_is_judged_anew(table: Path) -> None:
    """Without the version that was read, the second would write over the first."""
    for name in ("a", "b"):
        take_to_shadow(table, name, Path(f"/{name}"))
    seen = []

    def slow(now):
        seen.append(now)
        if len(seen) == 1:
            record(table, lambda then: promoted(then, "b"))
        return promoted(now, "a")

    with pytest.raises(InputError, match="a was not judged against what is live now, b"):
        record(table, slow)
    assert len(seen) == 2
    assert read_releases(table).live_id == "b"


def test_who_never_comes_first_is_told_so(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table_module, "TRIES", 3)
    record(table, lambda now: added(now, "a", "/a"))
    names = iter("bcdefgh")

    def late(now):
        record(table, lambda then: added(then, next(names), "/other"))
        return added(now, "z", "/z")

    with pytest.raises(StoreError, match="refused 3 times"):
        record(table, late)
    assert "z" not in read_releases(table).current


@pytest.mark.slow
def test_processes_that_make_the_table_at_once_all_get_into_it(table: Path) -> None:
    names = list("abcdef")
    assert at_once(add, table, names) == ["trained"] * len(names)
    assert sorted(read_releases(table).current) == names
    assert len(read_releases(table).entries) == len(names)
    # Again, all of them at once: nothing is new.
    assert at_once(add, table, names) == [""] * len(names)
    assert len(read_releases(table).entries) == len(names)


@pytest.mark.slow
def test_of_operators_who_promote_at_once_one_does_and_the_others_are_told_to_judge_again(table: Path) -> None:
    take_live(table, "old", Path("/old"))
    names = list("abcd")
    for name in names:
        take_to_shadow(table, name, Path(f"/{name}"))
    said = at_once(promote, table, names)
    (winner,) = [name for name, words in zip(names, said, strict=True) if words == f"old standby {name} live"]
    for name, words in zip(names, said, strict=True):
        if name != winner:
            assert f"release {name} was not judged against what is live now, {winner}" in words
    assert read_releases(table).live_id == winner
    assert [e.checkpoint_id for e in read_releases(table).entries if e.state == State.LIVE] == ["old", winner]


@pytest.mark.slow
def test_the_same_promotion_by_several_is_done_once(table: Path) -> None:
    take_live(table, "old", Path("/old"))
    take_to_shadow(table, "a", Path("/a"))
    assert sorted(at_once(promote, table, ["a"] * 4)) == ["", "", "", "old standby a live"]


FLIP = """
import sys
from pathlib import Path
from jobs.releases.states import promoted, rolled_back
from jobs.releases.table import record
table = Path(sys.argv[1])
print("ready", flush=True)
while True:
    record(table, lambda now: promoted(now, "b"))
    record(table, lambda now: rolled_back(now, "b"))
"""


@pytest.mark.slow
def test_a_kill_at_any_moment_leaves_one_that_is_live_and_a_table_that_goes_on(table: Path) -> None:
    take_live(table, "a", Path("/a"))
    take_live(table, "b", Path("/b"))
    record(table, lambda now: rolled_back(now, "b"))
    flips = 0
    for n in range(12):
        process = subprocess.Popen([sys.executable, "-c", FLIP, str(table)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        time.sleep(0.02 + 0.013 * n)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
        now = read_releases(table)
        assert sorted(str(entry.state) for entry in now.current.values()) == ["live", "standby"]
        # No half of a flip: one leaves whenever one comes.
        entered = [e for e in now.entries if e.state in (State.LIVE, State.STANDBY)]
        assert len(entered) % 2 == 1
        flips = len(now.entries)
        record(table, lambda then: promoted(then, "b"))
        record(table, lambda then: rolled_back(then, "b"))
        assert read_releases(table).live_id == "a"
        assert newest_release(table, State.LIVE) == read_releases(table).live
    assert flips > 50


def test_looking_reads_the_table_only_after_a_commit(table: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    take_live(table, "a", Path("/a"))
    reads = []
    monkeypatch.setattr(table_module, "read_releases", lambda path: reads.append(path) or read_releases(path))
    for _ in range(3):
        assert newest_release(table, State.LIVE).checkpoint_id == "a"
    assert len(reads) == 1
    take_to_shadow(table, "b", Path("/b"))
    assert newest_release(table, State.LIVE).checkpoint_id == "a"
    record(table, lambda now: promoted(now, "b"))
    assert newest_release(table, State.LIVE).checkpoint_id == "b"
    record(table, lambda now: rolled_back(now, "b"))
    assert newest_release(table, State.LIVE).checkpoint_id == "a"
    assert len(reads) == 4


def test_looking_sees_a_table_that_was_made_anew_and_one_that_is_gone(table: Path) -> None:
    take_live(table, "a", Path("/a"))
    version = DeltaTable(table).version()
    assert newest_release(table, State.LIVE).checkpoint_id == "a"
    shutil.rmtree(table)
    take_live(table, "b", Path("/b"))
    assert DeltaTable(table).version() == version
    assert newest_release(table, State.LIVE).checkpoint_id == "b"
    shutil.rmtree(table / "_delta_log")
    assert not is_releases(table)
    assert newest_release(table, State.LIVE) is None


def test_nothing_live_is_nothing(table: Path) -> None:
    record(table, lambda now: added(now, "a", "/a"))
    assert newest_release(table, State.LIVE) is None
    record(table, lambda now: retired(now, "a"))
    assert newest_release(table, State.LIVE) is None


def test_over_a_hundred_commits_are_followed_still(table: Path) -> None:
    """Delta writes a checkpoint of its own then, and may drop old commits."""
    take_live(table, "a", Path("/a"))
    take_to_shadow(table, "b", Path("/b"))
    for _ in range(55):
        record(table, lambda now: promoted(now, "b"))
        assert newest_release(table, State.LIVE).checkpoint_id == "b"
        record(table, lambda now: rolled_back(now, "b"))
        assert newest_release(table, State.LIVE).checkpoint_id == "a"
    assert DeltaTable(table).version() > 110


@pytest.mark.parametrize("what", ["commit", "rows"])
def test_a_table_that_cannot_be_read_is_named(table: Path, what: str) -> None:
    take_live(table, "a", Path("/a"))
    if what == "commit":
        newest = max((table / "_delta_log").glob("*.json"))
        newest.write_text("{")
    else:
        for file in table.glob("*.parquet"):
            file.unlink()
    with pytest.raises(StoreError, match=f"the releases at {table} cannot be read"):
        read_releases(table)
    with pytest.raises(StoreError, match="cannot be read"):
        record(table, lambda now: added(now, "b", "/b"))
