"""The benchmark of the backfill: events/s of a core against the plain fold and a grouped apply, and its memory.

A task's fold is timed beside the floor in this process, in turns. The whole job, with scan, shuffle, sort and puts into
a Redis, runs on a Spark cluster of its own, whose executors have one core each, and so does the naive way.
"""

from __future__ import annotations

import os
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any
from zlib import crc32

import msgspec
import psutil
from pyspark.sql import functions as F
from rich.console import Console

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.redis_settings import RedisSettings
from jobs.backfill import backfill, events_up_to
from jobs.bench import java_and_kafka, machine, versions
from jobs.bench_backfill_sides import (
    arrow_batches,
    naive_rows,
    plain_fold,
    random_records,
    sampled,
    task_fold,
    write_log,
)
from jobs.bench_load import random_checkpoint
from jobs.event_log import read_records
from jobs.local_cluster import SparkCluster, running_cluster
from jobs.local_servers import RedisServer, require_redis, running_redis
from jobs.spark import open_spark
from models.checkpoint import Checkpoint, Sizes
from models.errors import VqlError

COMPARED_USERS = 1_000
SAMPLE_EVERY_S = 0.2


class BackfillBench(msgspec.Struct, frozen=True, kw_only=True):
    """What to measure. users, length: of the log that the job reads, with `length` events of each user.

    lengths, fold_events, rounds: of the fold beside the floor. executor_mb: Java's heap. naive: whether to run it.
    """

    users: int = 20_000
    length: int = 100
    lengths: tuple[int, ...] = (100, 1_000, 10_000)
    fold_events: int = 400_000
    rounds: int = 3
    executors: int = 2
    executor_mb: int = 2_048
    naive: bool = True
    sizes: Sizes = Sizes()


class FoldFigures(msgspec.Struct, frozen=True, kw_only=True):
    """Events/s of one core, medians of rounds. ratio: a task's over the floor's, median of the rounds' own."""

    floor: float
    task: float
    ratio: float


class JobFigures(msgspec.Struct, frozen=True, kw_only=True):
    """A job on the cluster: events over seconds, and over those of all its executors' cores."""

    events_per_s: float
    events_per_s_per_core: float
    seconds: float


class MemoryFigures(msgspec.Struct, frozen=True, kw_only=True):
    """The most resident memory (MiB) of an executor's Java, and of all the Python beside it."""

    java: float
    python: float


def run_backfill_bench(plan: BackfillBench, console: Console) -> dict[str, Any]:
    """All figures, as write_figures takes them.

    Raises MachineError where Java, Delta's jars or redis-server are missing, VqlError where the sides' rows differ.
    """
    started_s, on = time.monotonic(), machine()
    require_redis()  # before what takes a while
    with tempfile.TemporaryDirectory(prefix="vql-bench-") as name:
        folder = Path(name)
        checkpoint = random_checkpoint(folder / "checkpoint", plan.sizes)
        folds = {str(length): _fold_figures(plan, checkpoint, length, console) for length in plan.lengths}
        write_log(folder / "log" / "events", plan.users, plan.length)
        write_log(folder / "warm" / "events", 200, 10)
        for server in ("redis", "cluster"):
            (folder / server).mkdir()
        with (
            running_redis(folder / "redis") as redis,
            running_cluster(folder / "cluster", plan.executors, plan.executor_mb) as cluster,
            redis.client() as client,
        ):
            found = {"java": java_and_kafka()["java"], "redis-server": client.info("server")["redis_version"]}
            jobs = _on_the_cluster(plan, checkpoint, redis, cluster, console)
    return (
        {"fold": folds}
        | jobs
        | {
            "machine": on,
            "versions": versions(**found),
            "bench": plan,
            "seconds": round(time.monotonic() - started_s, 1),
        }
    )


def _fold_figures(plan: BackfillBench, checkpoint: Checkpoint, length: int, console: Console) -> FoldFigures:
    """The floor and a task's fold by turns; the first turn, which compiles, does not count."""
    opened = Opened(checkpoint)
    records = random_records(max(1, plan.fold_events // length), length)
    batches = arrow_batches(records, length)
    floors, tasks = [], []
    for _ in range(1 + plan.rounds):
        began_s = time.perf_counter()
        plain_fold(opened.fold, records, length)
        between_s = time.perf_counter()
        task_fold(opened, batches)
        floors.append(len(records) / (between_s - began_s))
        tasks.append(len(records) / (time.perf_counter() - between_s))
    figures = FoldFigures(
        floor=median(floors[1:]),
        task=median(tasks[1:]),
        ratio=median(task / floor for task, floor in zip(tasks[1:], floors[1:], strict=True)),
    )
    console.print(
        f"{length:,} events a user: floor {figures.floor:,.0f} events/s, task {figures.task:,.0f}", style="dim"
    )
    return figures


def _on_the_cluster(
    plan: BackfillBench, checkpoint: Checkpoint, redis: RedisServer, cluster: SparkCluster, console: Console
) -> dict[str, Any]:
    """The job, its memory, what its rows cost Redis, and the naive way."""
    folder = checkpoint.path.parent
    store = StoreHandle(state=folder, redis=RedisSettings(url=redis.url))
    figures: dict[str, Any] = {}
    with _environment(cluster.environment):
        spark = open_spark(cluster.master, "vql-bench", stage_bars=False)
    try:
        # Starts the executors and their Python, and reads the libraries once.
        backfill(spark, checkpoint, folder / "warm", store, puts_per_s=0)
        store.open().delete_checkpoint(checkpoint.checkpoint_id)
        with _peak_memory(cluster) as memory:
            began_s, busy_s = time.monotonic(), _busy_s(redis)
            done = backfill(spark, checkpoint, folder / "log", store, puts_per_s=0)
            figures["job"] = _speed(plan, done.events, time.monotonic() - began_s)
            figures["redis_us_per_row"] = round((_busy_s(redis) - busy_s) / done.users * 1e6, 1)
        figures["memory_mb"] = MemoryFigures(java=memory["java"], python=memory["python"])
        console.print(f"job: {figures['job'].events_per_s_per_core:,.0f} events/s of a core", style="dim")
        if plan.naive:
            wanted = events_up_to(read_records(spark, folder / "log"), done.cut)
            rows = naive_rows(wanted, checkpoint).cache()
            began_s = time.monotonic()
            events = rows.agg(F.sum("events")).collect()[0][0]
            figures["naive"] = _speed(plan, events, time.monotonic() - began_s)
            console.print(f"naive: {figures['naive'].events_per_s_per_core:,.0f} events/s of a core", style="dim")
            some = list(sampled(plan.users, COMPARED_USERS))
            made = {row.user_id: row.row for row in rows.where(F.col("user_id").isin(some)).collect()}
            figures["rows_compared"] = _require_equal(made, some, store, checkpoint)
    finally:
        spark.stop()
    return figures


def _busy_s(redis: RedisServer) -> float:
    """The seconds of a core that the server has had."""
    with redis.client() as client:
        said = client.info("cpu")
    return said["used_cpu_user"] + said["used_cpu_sys"]


def _speed(plan: BackfillBench, events: int, seconds: float) -> JobFigures:
    per_s = events / seconds
    return JobFigures(events_per_s=per_s, events_per_s_per_core=per_s / plan.executors, seconds=round(seconds, 2))


def _require_equal(made: Mapping[str, int], users: list[str], store: StoreHandle, checkpoint: Checkpoint) -> int:
    """How many rows were compared, by stamp and recent events: what is folded differs by rounding, as batches do.

    Raises VqlError for one that the job and the naive way have not made alike.
    """
    stored = store.open().get_rows(checkpoint.checkpoint_id, users)
    for user_id, row in zip(users, stored, strict=True):
        if row is None or crc32(row.recent) != made.get(user_id):
            raise VqlError(f"the row of {user_id} is another one by a grouped apply: these figures say nothing")
    return len(users)


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """These variables, for as long as the context lasts: Java has them from then on."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _peak_memory(cluster: SparkCluster) -> Iterator[dict[str, float]]:
    """The most resident memory of any executor (MiB) while the context lasts."""
    peak, ended = {"java": 0.0, "python": 0.0}, threading.Event()

    def sample() -> None:
        while not ended.wait(SAMPLE_EVERY_S):
            for executor in cluster.executors():
                python = sum(_resident_mb(child) for child in executor.children(recursive=True))
                peak["java"] = max(peak["java"], _resident_mb(executor))
                peak["python"] = max(peak["python"], python)

    thread = threading.Thread(target=sample, name="memory", daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        ended.set()
        thread.join()


def _resident_mb(process: psutil.Process) -> float:
    """0 for one that has ended meanwhile."""
    try:
        return process.memory_info().rss / 2**20
    except psutil.NoSuchProcess:
        return 0.0


def table_rows(figures: Mapping[str, Any]) -> dict[str, list[str]]:
    """The folds by length, for people."""
    folds = figures["fold"].values()
    return {
        "floor, events/s of a core": [f"{each.floor:,.0f}" for each in folds],
        "a task's fold": [f"{each.task:,.0f}" for each in folds],
        "task / floor": [f"{each.ratio:.0%}" for each in folds],
    }
