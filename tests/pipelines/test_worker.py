from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from models.errors import MismatchError
from pipelines.worker import (
    CheckpointRef,
    forget_opened,
    opened_checkpoint,
    opened_rows,
    stop_requested,
)
from tests.small import small_checkpoint, write_items

REPOSITORY = Path(__file__).parents[2]


def test_a_store_and_a_checkpoint_are_opened_once(tmp_path: Path) -> None:
    forget_opened()
    ref = CheckpointRef(path=tmp_path / "c", checkpoint_id=small_checkpoint(tmp_path / "c").checkpoint_id)

    assert opened_rows(StoreHandle(state=tmp_path)) is opened_rows(StoreHandle(state=tmp_path))
    assert opened_checkpoint(ref) is opened_checkpoint(CheckpointRef(path=ref.path, checkpoint_id=ref.checkpoint_id))


def test_a_stream_started_again_sees_the_items_of_now(tmp_path: Path) -> None:
    forget_opened()
    checkpoint = small_checkpoint(tmp_path / "c")
    ref = CheckpointRef(path=checkpoint.path, checkpoint_id=checkpoint.checkpoint_id)
    items = len(opened_checkpoint(ref).fold.table)
    write_items(checkpoint, ["n1", "n2"], "items-00001.parquet")
    stop_requested.set()
    forget_opened()

    assert len(opened_checkpoint(ref).fold.table) == items + 2
    assert not stop_requested.is_set()


def test_a_checkpoint_replaced_under_the_stream_is_refused(tmp_path: Path) -> None:
    forget_opened()
    ref = CheckpointRef(path=tmp_path / "c", checkpoint_id=small_checkpoint(tmp_path / "c").checkpoint_id)
    small_checkpoint(tmp_path / "c", seed=1)

    with pytest.raises(MismatchError, match=ref.checkpoint_id):
        opened_checkpoint(ref)


def test_a_worker_writes_nothing_to_the_standard_output_that_nobody_reads(tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "c")
    program = f"""
from pathlib import Path
import structlog
from pipelines.worker import CheckpointRef, opened_checkpoint
opened_checkpoint(CheckpointRef(path=Path({str(checkpoint.path)!r}), checkpoint_id={checkpoint.checkpoint_id!r}))
structlog.get_logger().warning("a line")
"""
    said = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)

    assert said.stdout == ""
    assert "a line" in said.stderr
