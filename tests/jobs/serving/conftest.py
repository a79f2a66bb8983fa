"""One server for the tests that change nothing: a checkpoint, an embedded store with rows, and the process."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from models.checkpoint import Checkpoint, open_checkpoint
from tests.jobs.serving.processes import Server, serving
from tests.jobs.serving.shop import put_rows
from tests.small_ranker import scoring_checkpoint


@pytest.fixture(scope="session")
def serving_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With `checkpoint`, and `state` that holds rows of its users."""
    folder = tmp_path_factory.mktemp("serving")
    (folder / "state").mkdir()
    rows = StoreHandle(state=folder / "state", redis=None).open()
    put_rows(scoring_checkpoint(folder / "checkpoint"), rows)
    rows.close()
    return folder


@pytest.fixture(scope="session")
def checkpoint(serving_folder: Path) -> Checkpoint:
    return open_checkpoint(serving_folder / "checkpoint")


@pytest.fixture(scope="session")
def server(serving_folder: Path) -> Iterator[Server]:
    with serving(serving_folder / "checkpoint", serving_folder / "state") as running:
        yield running
