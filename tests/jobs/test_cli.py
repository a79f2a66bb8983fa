"""The command line teaches, does what it says, and says in one line what it cannot do."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from feature_repo.handle import StoreHandle
from feature_repo.store import row_puts
from models.checkpoint import Checkpoint
from models.event import Event
from models.row import Row, advance, new_row
from models.wire import Stamp
from tests.jobs.commands import Said, assert_one_line
from tests.pipelines.small_log import append_all, by_partition, new_log, recent_of
from tests.small import random_events, small_checkpoint
from tests.small_ranker import scoring_checkpoint

# What each command's help must name, and what its user has to know first.
COMMANDS = {
    "ingest": ["--input", "--log", "--format", "--column", "--where", "--partitions", "quarantine", "Example"],
    "ingest-items": ["--input", "--log", "--column", "item_id"],
    "train": ["--log", "--checkpoint", "--work", "--half-life", "--field", "--epochs", "--seed", "kill"],
    "encode-items": ["--checkpoint", "--log"],
    "backfill": ["--checkpoint", "--log", "--state", "--cut", "stream"],
    "stream": ["--checkpoint", "--log", "--state", "--until", "--from", "--partitions", "--runner", "--dead-letters-t"],
    "dead-letters": ["list", "show", "replay", "Reasons"],
    "data": ["list", "prepare", "Public data sets"],
    "release": ["add", "gate", "promote", "rollback", "retire", "--dry-run"],
    "doctor": ["--state", "--checkpoint", "exit code", "Example"],
    "rank": ["--candidates", "--checkpoint", "--state", "--now-ms", "The user id"],
    "setup": ["Java", "jars"],
    "demo": ["--folder", "report"],
}
HEAVY = ("pyspark", "torch", "apache_beam", "feast", "pandas", "pyarrow", "matplotlib")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return scoring_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log of 300 events."""
    new_log(tmp_path / "log" / "events")
    append_all(tmp_path / "log" / "events", by_partition(random_events(300)))
    return tmp_path / "log"


def row_of(checkpoint: Checkpoint, events: list[Event]) -> Row:
    position = Stamp(epoch=1, partition=1, offset=-1)
    recent = recent_of(checkpoint, events, range(len(events)))
    return advance(new_row(checkpoint.spec, 1, 1), recent, position, checkpoint.fold())[0]


def put_row(state: Path, checkpoint_id: str, row: Row) -> None:
    rows = StoreHandle(state=state).open()
    assert rows.put_rows(checkpoint_id, row_puts(["u0"], [row], [None])) == [True]
    rows.commit_positions(checkpoint_id, row.stamp.epoch, {row.stamp.partition: row.stamp.offset})


def test_help_names_every_command_and_the_way_of_an_event(vql) -> None:
    said = vql("--help")
    assert said.code == 0
    assert all(command in said.out for command in COMMANDS)
    way = said.out[said.out.index("The way of an event") :]
    assert way.index("ingest") < way.index("train") < way.index("encode-items") < way.index("backfill")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_teaches_its_options(vql, command: str) -> None:
    said = vql(command, "--help")
    assert said.code == 0
    assert [word for word in COMMANDS[command] if word not in said.out] == []


def test_help_needs_no_heavy_library() -> None:
    program = f"""
import sys
from jobs.cli import main
sys.argv = ["vql", "train", "--help"]
try:
    main()
except SystemExit:
    print("LOADED", [name for name in {HEAVY} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("LOADED []")


def test_the_version_is_the_packages(vql) -> None:
    assert vql("--version") == Said(code=0, out=importlib.metadata.version("vql-cache") + "\n", err="")


def test_a_folder_that_is_no_checkpoint_is_named(vql, tmp_path: Path, state: Path) -> None:
    said = vql("rank", "u0", "--candidates", "i1", "--checkpoint", tmp_path, "--state", state)
    assert_one_line(said, 3, "CheckpointError", f"{tmp_path} is no checkpoint", "vql train makes one")


def test_a_damaged_checkpoint_is_named(vql, checkpoint: Checkpoint, state: Path) -> None:
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    said = vql("rank", "u0", "--candidates", "i1", "--checkpoint", checkpoint.path, "--state", state)
    assert_one_line(said, 3, "CheckpointError", str(file), "restore it or train again")


def test_a_user_without_a_row_is_named(vql, checkpoint: Checkpoint, state: Path) -> None:
    put_row(state, checkpoint.checkpoint_id, row_of(checkpoint, random_events(20, users=1)))
    said = vql("rank", "nobody", "--candidates", "i1", "--checkpoint", checkpoint.path, "--state", state)
    assert_one_line(said, 2, "InputError", "user 'nobody' has no row")


def test_a_store_that_was_never_filled_is_refused(vql, checkpoint: Checkpoint, state: Path) -> None:
    said = vql("rank", "u0", "--candidates", "i1", "--checkpoint", checkpoint.path, "--state", state)
    assert_one_line(said, 5, "StoreError", "neither a backfill nor positions", "run vql backfill")


def test_rank_shows_a_table_best_first(vql, checkpoint: Checkpoint, state: Path) -> None:
    put_row(state, checkpoint.checkpoint_id, row_of(checkpoint, random_events(20, users=1)))
    said = vql("rank", "u0", "--candidates", "i1,i2,[b]odd", "--checkpoint", checkpoint.path, "--state", state)
    assert (said.code, said.err) == (0, "")
    assert "user u0: 20 events, stamp 1:1:19.0" in said.out
    # Ids are data, not markup.
    (odd,) = [line for line in said.out.splitlines() if "odd" in line]
    assert "[b]odd" in odd
    assert "unknown item" in odd


@pytest.mark.parametrize(
    ("what", "code", "words"),
    [("damaged", 4, "WireError"), ("foreign", 3, "ForeignRowError")],
)
def test_a_row_that_cannot_be_used_is_named(
    vql, checkpoint: Checkpoint, state: Path, tmp_path: Path, what: str, code: int, words: str
) -> None:
    if what == "foreign":
        put_row(state, checkpoint.checkpoint_id, row_of(small_checkpoint(tmp_path / "other"), random_events(20)))
    else:
        (good,) = row_puts(["u0"], [row_of(checkpoint, random_events(20))], [None])
        bad = replace(good, recent=good.recent[:-1] + b"?")
        rows = StoreHandle(state=state).open()
        rows.put_rows(checkpoint.checkpoint_id, [bad])
        rows.commit_positions(checkpoint.checkpoint_id, 1, {1: 19})
    said = vql("rank", "u0", "--candidates", "i1", "--checkpoint", checkpoint.path, "--state", state)
    assert_one_line(said, code, words, f"the row of user 'u0' in {state} is {what}")


@pytest.mark.parametrize(
    ("option", "words"),
    [
        (["--from", "newest"], "--from: 'newest' is none of resume, earliest, latest"),
        (["--until", "tomorrow"], "--until: 'tomorrow' is none of end, forever"),
        (["--partitions", "0,two"], "--partitions: 'two' is not a whole number"),
        (["--partitions", "0,7", "--from", "earliest"], "partitions [7] are not in log"),
    ],
)
@pytest.mark.beam
def test_an_option_of_the_stream_that_makes_no_sense_is_named(
    vql, checkpoint: Checkpoint, state: Path, log: Path, option: list[str], words: str
) -> None:
    said = vql("stream", "--checkpoint", checkpoint.path, "--state", state, "--log", log, *option)
    assert_one_line(said, 2, "InputError", words)


def test_options_that_the_parser_refuses_exit_with_2(vql, tmp_path: Path) -> None:
    assert "Missing option" in vql("rank", "u0").err
    assert vql("ingest", "--input", "x", "--log", tmp_path, "--partitions", 0).code == 2
    assert vql("conquer").code == 2


@pytest.mark.beam
def test_a_store_that_was_never_backfilled_stops_the_stream(
    vql, checkpoint: Checkpoint, state: Path, log: Path
) -> None:
    said = vql("stream", "--checkpoint", checkpoint.path, "--state", state, "--log", log, "--until", "end")
    assert_one_line(said, 5, "StoreError", "were never backfilled; run vql backfill")


@pytest.mark.beam
def test_a_foreign_row_stops_the_stream(vql, checkpoint: Checkpoint, state: Path, log: Path, tmp_path: Path) -> None:
    put_row(state, checkpoint.checkpoint_id, row_of(small_checkpoint(tmp_path / "other"), random_events(20)))
    options = ["--from", "earliest", "--until", "end"]
    said = vql("stream", "--checkpoint", checkpoint.path, "--state", state, "--log", log, *options)
    assert said.code == 3, said
    assert "ForeignRowError" in said.err.splitlines()[-1]
    assert "Traceback" not in said.err


@pytest.mark.beam
def test_the_stream_says_what_it_folded(vql, checkpoint: Checkpoint, state: Path, log: Path) -> None:
    options = ["--checkpoint", checkpoint.path, "--state", state, "--log", log, "--until", "end"]
    assert "300 events folded" in vql("stream", *options, "--from", "earliest").out
    said = vql("stream", *options)
    assert said.code == 0
    assert "0 events folded" in said.out


def test_debug_shows_the_stack(vql, tmp_path: Path, state: Path) -> None:
    command = ["rank", "u0", "--candidates", "i1", "--checkpoint", tmp_path, "--state", state]
    with pytest.raises(Exception, match="is no checkpoint") as error:
        vql("--debug", *command)
    assert len(error.traceback) > 5
    done = subprocess.run(
        [sys.executable, "-m", "jobs.cli", "--debug", *map(str, command)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr


def test_a_machine_without_java_is_told_what_to_install(vql, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("JAVA_HOME", raising=False)
    said = vql("ingest", "--input", tmp_path / "x.parquet", "--log", tmp_path / "log")
    assert_one_line(said, 6, "MachineError", "Java 17 or newer is needed")
    assert vql("setup").code == 6
