"""A small checkpoint, and Feast on an empty state folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.store import RowStore
from models.checkpoint import Checkpoint
from models.row import Fold
from tests.feature_repo.subjects import SUBJECTS, Subject
from tests.small import small_checkpoint


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    return request.param(tmp_path)


@pytest.fixture
def store(subject: Subject) -> RowStore:
    return subject.open()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_checkpoint(tmp_path_factory.mktemp("first") / "checkpoint")


@pytest.fixture(scope="session")
def other_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return small_checkpoint(tmp_path_factory.mktemp("second") / "checkpoint", seed=1)


@pytest.fixture(scope="session")
def fold(checkpoint: Checkpoint) -> Fold:
    return checkpoint.fold()


@pytest.fixture
def state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state folder in VQL_STATE, which is put back after the test."""
    monkeypatch.setenv("VQL_STATE", str(tmp_path / "state"))
    return tmp_path / "state"


@pytest.fixture
def feast(state: Path):
    from feature_repo.repo import open_repo

    return open_repo(state)
