"""A whole installation on one machine: Kafka, a Redis with a disk, a Spark cluster, and the product's processes."""

from __future__ import annotations

import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import pytest

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from jobs.local_cluster import SparkCluster, running_cluster
from jobs.local_servers import RedisServer
from jobs.parity import RowParity, compare_rows
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import UnavailableError
from models.user_hash import KEY_FILE
from tests.kafka_broker import Broker
from tests.redis_server import PERSISTENT, running_redis
from tests.soak.processes import Part, Place, Steps

Found = TypeVar("Found")
TOPIC, PARTITIONS = "shopping", 3
ROOT = Path(__file__).parents[2]
EXECUTOR_MB = 512
# Log lines: a stream's is its progress, every ten seconds.
STREAMING, SERVING = '"event": "stream",', '"event": "serving"'
DOWN_S = (0.1, 2.0)
CATCH_UP_WAIT_S, STORE_WAIT_S = 600.0, 120.0
KEY = b"a key of the tests, of 32 bytes."
# A ranker waits for the store so long, on a machine on which everything runs.
DEADLINE_MS = 1000


@dataclass(frozen=True, kw_only=True)
class Scene:
    """Where all of it is. rows: the test's own handle of the store."""

    folder: Path
    broker: Broker
    store: RedisServer
    cluster: SparkCluster
    place: Place
    rows: RedisRows

    @property
    def steps(self) -> Steps:
        return Steps(place=self.place)

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def releases(self) -> Path:
        return self.folder / "releases"

    @property
    def reads(self) -> Path:
        return self.folder / "reads"

    @property
    def on_cluster(self) -> list[object]:
        return ["--log", self.log, "--master", self.cluster.master]

    @property
    def locally(self) -> list[object]:
        return ["--log", self.log]

    def checkpoint(self, name: str) -> Checkpoint:
        return open_checkpoint(self.folder / name)

    def ingest(self) -> None:
        """The topic into the log, up to its end as of now."""
        self.steps.run("ingest", "--from", "kafka", "--topic", TOPIC, *self.locally)

    def stream(self, name: str) -> Part:
        """The stream of a checkpoint."""
        options = ["--checkpoint", self.folder / name, "--topic", TOPIC, "--log", self.log, "--state", self.state]
        return Part(f"stream of {name}", ["stream", *options], self.place, STREAMING)

    def ranker(self, number: int, port: int, read_share: float) -> Part:
        """A ranker that follows the releases, asks what is in shadow too, and logs a share of its reads."""
        logged = ["--read-log", self.reads, "--read-log-share", read_share]
        followed = ["--checkpoint", self.releases, "--shadow", self.releases, "--shadow-share", 0.2]
        options = ["--state", self.state, "--port", port, "--deadline-ms", DEADLINE_MS, "--linger", 0]
        return Part(f"ranker {number}", ["serve", *followed, *options, *logged], self.place, SERVING)

    def wait_until_streamed(self, checkpoint_id: str, records: int) -> None:
        """Until a stream has committed so many records."""
        deadline_s = time.monotonic() + CATCH_UP_WAIT_S
        while (done := sum(at + 1 for _, at in self.rows.positions(checkpoint_id).values())) < records:
            assert time.monotonic() < deadline_s, f"{done} of {records} are streamed"
            time.sleep(0.1)
        assert done == records

    def parity(self, checkpoint: Checkpoint) -> RowParity:
        """Every user's row against an independent fold of the log's raw events, in float64."""
        reader = Reader(self.handle().open(), Opened(checkpoint))
        try:
            return compare_rows(reader, self.log)
        finally:
            reader.close()

    def patiently(self, call: Callable[[], Found]) -> Found:
        """Repeated while the store is away."""
        deadline_s = time.monotonic() + STORE_WAIT_S
        while True:
            try:
                return call()
            except UnavailableError:
                assert time.monotonic() < deadline_s, "the store does not come back"
                time.sleep(0.05)

    def handle(self) -> StoreHandle:
        return StoreHandle(state=self.state, redis=RedisSettings(url=self.store.url))


class Store:
    """The store as something to be killed: what it acknowledged is on its disk."""

    name = "Redis"

    def __init__(self, server: RedisServer) -> None:
        self._server = server

    def restart(self, rng: random.Random) -> None:
        self._server.kill()
        time.sleep(rng.uniform(*DOWN_S))
        self._server.start()

    def look(self) -> None:
        process = self._server.process
        assert process is not None
        assert process.poll() is None, "Redis ended by itself"


@contextmanager
def running_scene(folder: Path, broker: Broker) -> Iterator[Scene]:
    """All servers, an empty topic and nothing else."""
    for name in ("redis", "cluster", "state"):
        (folder / name).mkdir()
    with ExitStack() as ending:
        environment = ending.enter_context(pytest.MonkeyPatch.context())
        # Each of the many programs lasts for seconds: Java's second compiler would only take their time.
        environment.setenv("JAVA_TOOL_OPTIONS", "-XX:TieredStopAtLevel=1")
        store = ending.enter_context(running_redis(folder / "redis", PERSISTENT))
        cluster = ending.enter_context(running_cluster(folder / "cluster", memory_mb=EXECUTOR_MB))
        broker.create_topic(TOPIC, PARTITIONS)
        ending.callback(broker.delete_topic, TOPIC)
        (folder / "user-hash-key").write_bytes(KEY)
        settings = {
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "VQL_DRIVER_MEMORY": "1g",
            "VQL_REDIS_URL": store.url,
            "VQL_KAFKA_BOOTSTRAP_SERVERS": broker.address,
            KEY_FILE: str(folder / "user-hash-key"),
        }
        place = Place(folder=folder, environment=os.environ | cluster.environment | settings, kills=Counter())
        ending.callback(place.kill_all)
        rows = RedisRows(RedisSettings(url=store.url))
        ending.callback(rows.close)
        yield Scene(folder=folder, broker=broker, store=store, cluster=cluster, place=place, rows=rows)
