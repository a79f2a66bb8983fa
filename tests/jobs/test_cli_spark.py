"""The commands that start Spark, in the session of the tests: the way of an event, and what they cannot do."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.checkpoint import open_checkpoint
from tests.jobs.commands import assert_one_line
from tests.jobs.tiny import TRAIN_OPTIONS, Shop, items, purchases, write_rows
from tests.models.test_files import MOUNT_REFUSED, SMALL_DISK


@pytest.mark.spark
def test_the_way_of_an_event_by_commands(vql, spark, shop: Shop, own_shop: Shop, tmp_path: Path) -> None:
    """Ingest to rank; the training is the shop's, which the same job finds done."""
    rows = write_rows(tmp_path / "rows.parquet", purchases())
    said = vql("ingest", "--input", rows, "--log", own_shop.log)
    assert "720 rows read: 0 events appended, 720 already in the log, 0 quarantined" in said.out
    products = write_rows(tmp_path / "products.parquet", items())
    said = vql("ingest-items", "--input", products, "--log", own_shop.log, "--column", "category=category")
    assert "24 items" in said.out
    work = tmp_path / "work"
    said = vql("train", "--log", shop.log, "--checkpoint", own_shop.checkpoint, "--work", work, *TRAIN_OPTIONS)
    assert f"checkpoint {open_checkpoint(shop.checkpoint).checkpoint_id} in {own_shop.checkpoint}" in said.out
    said = vql("encode-items", "--checkpoint", own_shop.checkpoint, "--log", own_shop.log)
    assert "0 items added; the table holds 25" in said.out
    state = ["--state", tmp_path / "state"]
    said = vql("backfill", "--checkpoint", own_shop.checkpoint, "--log", own_shop.log, *state, "--cut", "0=383,1=335")
    assert "30 rows with 720 events, complete up to {0: 383, 1: 335}" in said.out
    said = vql("rank", "u3", "--candidates", "i0,i1", "--checkpoint", own_shop.checkpoint, *state)
    assert said.code == 0
    assert "user u3: 24 events" in said.out


@pytest.mark.spark
def test_what_a_job_cannot_do_is_said_in_one_line(vql, spark, own_shop: Shop, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", purchases(range(1)))
    log = ["--log", tmp_path / "another"]
    said = vql("ingest", "--input", tmp_path / "nowhere.csv", *log, "--format", "csv")
    assert_one_line(said, 2, "InputError", "nowhere.csv does not exist")
    said = vql("ingest", "--input", rows, *log, "--column", "user_id=purchaser")
    assert_one_line(said, 2, "InputError", "`purchaser` cannot be resolved")
    said = vql("ingest", "--input", rows, *log, "--column", "user_id")
    assert_one_line(said, 2, "InputError", "'user_id' is not", "FIELD=EXPRESSION")
    (tmp_path / "text.parquet").write_text("user_id,item_id\nu1,i1\n")
    assert_one_line(vql("ingest", "--input", tmp_path / "text.parquet", *log), 2, "InputError", "is --format right?")
    train = ["--checkpoint", tmp_path / "early", "--work", tmp_path / "work", "--before-ms", 1]
    assert_one_line(vql("train", "--log", own_shop.log, *train), 2, "InputError", "no events before the cut")
    said = vql("encode-items", "--checkpoint", own_shop.checkpoint, *log)
    assert_one_line(said, 2, "InputError", "events is not a Delta table", "run: vql ingest")
    backfill = ["backfill", "--checkpoint", own_shop.checkpoint, "--log", own_shop.log, "--state", tmp_path / "state"]
    assert_one_line(vql(*backfill, "--cut", "0=9999"), 2, "InputError", "the cut {0: 9999} lies beyond the log")
    assert_one_line(vql(*backfill, "--cut", "0=x"), 2, "InputError", "'x' is not a whole number")


@pytest.mark.spark
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--half-life", "soon"], "half-life 'soon'"),
        (["--groups", "3"], "heads 4 do not divide into 3 groups"),
        (["--groups", "4", "--codewords", "70000"], "4 x 70000 codewords do not fit in 16 bits"),
        (["--model", "bert"], "model 'bert' is none of vql"),
        ([], "events is not a Delta table"),
    ],
)
def test_a_training_that_cannot_be_is_said_in_one_line(vql, spark, tmp_path: Path, options: list, words: str) -> None:
    folders = ["--log", tmp_path / "log", "--checkpoint", tmp_path / "out", "--work", tmp_path / "work"]
    assert_one_line(vql("train", *folders, *options), 2, "InputError", words)


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="a small disk needs Linux user namespaces")
def test_a_full_disk_ends_an_ingest_with_one_line(tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.parquet", purchases(range(3), users=200))
    (tmp_path / "disk").mkdir()
    program = f"""
import sys
from jobs.cli import main
sys.argv = ["vql", "ingest", "--input", {str(rows)!r}, "--log", sys.argv[1] + "/log"]
main()
"""
    command = ["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", str(tmp_path / "disk"), sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=dict(os.environ), check=False)
    if done.returncode == MOUNT_REFUSED or "unshare" in done.stderr:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    said = [line for line in done.stderr.splitlines() if not line.startswith("WARNING: Using incubator modules")]
    assert done.returncode == 6, done.stderr
    assert len(said) == 1, done.stderr
    assert "MachineError" in said[0]
    assert "no space left" in said[0]
