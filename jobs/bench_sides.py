"""The sides of the benchmark as processes: `vql stream` into Redis or SQLite, and the floor; and whether they agree.

The stream is the command as its operator has it. Its log line "stream ended" says how long it was busy: from the
first record at hand to the last put, start-up and end left out. The floor (`bench_floor`) is timed in the same way.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rich.console import Console

from feature_repo.handle import StoreHandle
from feature_repo.redis_settings import RedisSettings
from jobs.bench_floor import FloorDone, FloorJob, folded_key, recent_key
from jobs.bench_load import Record, fill
from jobs.local_servers import KafkaServer, RedisServer
from models.checkpoint import Checkpoint
from models.errors import VqlError
from models.wire import decode_folded

BATCH = 10_000
COMPARED_USERS = 1_000
FLOOR_DATABASE = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The servers, the checkpoint and the folder of a benchmark; options: what every `vql stream` of it is given."""

    partitions: int
    kafka: KafkaServer
    redis: RedisServer
    checkpoint: Checkpoint
    folder: Path
    console: Console
    options: tuple[str, ...] = ()

    def say(self, words: str) -> None:
        self.console.print(words, style="dim")

    def new_topic(self, name: str, records: Sequence[Record] = ()) -> str:
        self.kafka.create_topic(name, self.partitions, **{"max.message.bytes": "20000000"})
        fill(self.kafka.address, name, records)
        return name


def catch_up(bench: Bench, topic: str, store: Literal["redis", "embedded"]) -> dict[str, Any]:
    """Stream a topic from its first record to its end into an empty store; what the stream said when it ended."""
    if store == "redis":
        with bench.redis.client() as client:
            client.flushdb()
    with streaming(bench, topic, store, "--from", "earliest", "--until", "end") as running:
        running.process.wait()
        return running.ended()


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A `vql stream` process and its log."""

    process: subprocess.Popen[bytes]
    log: Path

    def ended(self) -> dict[str, Any]:
        """The fields of its log line "stream ended". Raises VqlError with its last line where there is none."""
        lines = self.log.read_text().splitlines()
        for line in reversed(lines):
            if line.startswith("{") and (said := msgspec.json.decode(line))["event"] == "stream ended":
                return said
        last = lines[-1] if lines else "it said nothing"
        raise VqlError(f"vql stream ended with {self.process.returncode}: {last}")


@contextmanager
def streaming(bench: Bench, topic: str, store: str, *options: str) -> Iterator[Running]:
    """`vql stream` on a state folder of its own; ended with the context, if it still runs."""
    state = Path(tempfile.mkdtemp(dir=bench.folder))
    (state / "log").mkdir()
    command = [sys.executable, "-m", "jobs.cli", "stream", "--topic", topic, *bench.options, *options]
    for option, path in {"checkpoint": bench.checkpoint.path, "log": state / "log", "state": state}.items():
        command += [f"--{option}", str(path)]
    log = state / "stream.err"
    with log.open("wb") as err:
        process = subprocess.Popen(command, env=_environment(bench, store), stdout=subprocess.DEVNULL, stderr=err)
    try:
        yield Running(process=process, log=log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _environment(bench: Bench, store: str | None) -> dict[str, str]:
    """This process's without the product's variables, which name other servers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VQL_") or name == "VQL_JARS"}
    redis = {"VQL_REDIS_URL": bench.redis.url} if store == "redis" else {}
    return kept | {"VQL_KAFKA_BOOTSTRAP_SERVERS": bench.kafka.address} | redis


def require_equal_rows(bench: Bench, user_ids: Sequence[str]) -> int:
    """How many rows were compared. Raises VqlError for one that stream and floor have not made alike."""
    chosen = list(user_ids[:: max(1, len(user_ids) // COMPARED_USERS)])
    store = StoreHandle(state=bench.folder, redis=RedisSettings(url=bench.redis.url)).open()
    streamed = store.get_rows(bench.checkpoint.checkpoint_id, chosen)
    store.close()
    with bench.redis.client() as client:
        client.select(FLOOR_DATABASE)
        folded_parts = client.mget([folded_key(user_id) for user_id in chosen])
        recent_parts = client.mget([recent_key(user_id) for user_id in chosen])
    compared = 0
    for user_id, row, folded, recent in zip(chosen, streamed, folded_parts, recent_parts, strict=True):
        if row is None and folded is None:
            continue
        compared += 1
        if row is None or folded is None or row.recent != recent or not _alike(row.folded, folded, bench.checkpoint):
            raise VqlError(f"the rows of user {user_id!r} by stream and by floor differ: one of them is wrong")
    return compared


def _alike(a: bytes, b: bytes, checkpoint: Checkpoint) -> bool:
    """Whether two folded parts hold the same; in float32, for what two folds round one fold does not."""
    (one, stamp), (other, other_stamp) = decode_folded(a, checkpoint.spec), decode_folded(b, checkpoint.spec)
    return (
        stamp == other_stamp
        and (one.count, one.reference_ms) == (other.count, other.reference_ms)
        and np.array_equal(one.code_N, other.code_N)
        and np.array_equal(one.net_N, other.net_N)
        and np.allclose(one.mass_NPR, other.mass_NPR, rtol=1e-4)
        and np.allclose(one.mean_NPRD, other.mean_NPRD, rtol=1e-4, atol=1e-4)
    )


def run_floor(bench: Bench, topic: str, events: int) -> FloorDone:
    with bench.redis.client() as client:
        client.flushall()
    job = FloorJob(
        kafka=bench.kafka.address,
        topic=topic,
        partitions=bench.partitions,
        events=events,
        redis_url=f"redis://127.0.0.1:{bench.redis.port}/{FLOOR_DATABASE}",
        checkpoint=str(bench.checkpoint.path),
        batch=BATCH,
    )
    command = [sys.executable, "-m", "jobs.bench_floor", msgspec.json.encode(job).decode()]
    said = subprocess.run(command, env=_environment(bench, None), capture_output=True, text=True, check=False)
    if said.returncode:
        raise VqlError(f"the floor ended with {said.returncode}: {said.stderr.strip()[-2000:]}")
    return msgspec.json.decode(said.stdout, type=FloorDone)
