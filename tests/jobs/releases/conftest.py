"""Two checkpoints that score, with rows in an embedded store, and a table of releases."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from models.checkpoint import Checkpoint
from tests.jobs.serving.shop import put_rows
from tests.small_ranker import scoring_checkpoint


@pytest.fixture
def first(tmp_path: Path) -> Checkpoint:
    return scoring_checkpoint(tmp_path / "first", 5)


@pytest.fixture
def second(tmp_path: Path) -> Checkpoint:
    return scoring_checkpoint(tmp_path / "second", 6)


@pytest.fixture
def store(tmp_path: Path, first: Checkpoint, second: Checkpoint) -> StoreHandle:
    """Holds rows of both."""
    (tmp_path / "state").mkdir()
    store = StoreHandle(state=tmp_path / "state", redis=None)
    rows = store.open()
    for checkpoint in (first, second):
        put_rows(checkpoint, rows)
    rows.close()
    return store


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "releases"
