"""What the fault tests share: the log on its topics, the reference for its rows, and a server of streams."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from models.checkpoint import Checkpoint
from tests.faults.gitlog import GitLog, produce, read_gitlog, untrained_checkpoint
from tests.faults.reference import fold_log
from tests.faults.runner import Streams, running_streams
from tests.faults.scene import Scene
from tests.kafka_broker import Broker
from tests.redis_server import RedisServer, running_redis

PART = 100_000


@pytest.fixture(scope="session")
def gitlog() -> GitLog:
    return read_gitlog()


@pytest.fixture(scope="session")
def checkpoint(gitlog: GitLog, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return untrained_checkpoint(tmp_path_factory.mktemp("faults") / "checkpoint")


@pytest.fixture(scope="session")
def whole(gitlog: GitLog, checkpoint: Checkpoint, broker: Broker) -> Scene:
    """The million events."""
    return scene("gitlog", gitlog, checkpoint, broker)


@pytest.fixture(scope="session")
def part(gitlog: GitLog, checkpoint: Checkpoint, broker: Broker) -> Scene:
    """The first of them, for controls."""
    return scene("gitlog-part", gitlog.first(PART), checkpoint, broker)


def scene(topic: str, log: GitLog, checkpoint: Checkpoint, broker: Broker) -> Scene:
    return Scene(
        address=broker.address,
        topic=produce(broker, topic, log),
        log=log,
        checkpoint=checkpoint,
        reference=fold_log(log, checkpoint.path),
    )


@pytest.fixture(scope="session")
def streams() -> Iterator[Streams]:
    with running_streams() as running:
        yield running


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as server:
        yield server


@pytest.fixture
def seed() -> int:
    """A new one for each test unless VQL_FAULTS_SEED says which; pytest shows it when the test fails."""
    chosen = int(os.environ.get("VQL_FAULTS_SEED") or secrets.randbelow(2**32))
    print(f"VQL_FAULTS_SEED={chosen}")
    return chosen
