"""A small checkpoint, and Feast on an empty state folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from feature_repo.store import RowStore
from models.checkpoint import Checkpoint
from models.row import Fold
from tests.feature_repo.subjects import SUBJECTS, Subject
from tests.redis_server import RedisServer, running_redis
from tests.small import small_checkpoint


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """The server that tests share; each of them begins with `redis_url`."""
    with running_redis(tmp_path_factory.mktemp("redis")) as server:
        yield server


@pytest.fixture
def redis_url(redis_server: RedisServer) -> str:
    """The address of an empty server."""
    with redis_server.client() as client:
        client.flushall()
    return redis_server.url


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param](request)


@pytest.fixture
def store(subject: Subject) -> Iterator[RowStore]:
    opened = subject.open()
    yield opened
    opened.close()


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


@pytest.fixture(params=SUBJECTS)
def chosen(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each of the stores, chosen as an operator does."""
    for name, value in SUBJECTS[request.param](request).environment.items():
        monkeypatch.setenv(name, value)
    return request.param


@pytest.fixture
def feast(state: Path):
    from feature_repo.repo import open_repo

    return open_repo(state)
