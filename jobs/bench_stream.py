"""The benchmark of the stream: throughput against a floor, bytes, freshness, memory and the cost of bad records.

Kafka and Redis run on the same cores as what is measured, and every side reads the same events in the same run. The
stream is the command `vql stream` in a process of its own, as its operator has it, whose log line "stream ended" says
how long it was busy: from the first record at hand to the last put, start-up and end left out. The floor
(`bench_floor`) is timed in the same way.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np
from rich.console import Console

from feature_repo.handle import StoreHandle
from feature_repo.redis_settings import RedisSettings
from jobs.bench import java_and_kafka, machine, versions
from jobs.bench_floor import FloorDone, FloorJob, row_keys
from jobs.bench_live import Site, offer, percentile_s, resident_mb
from jobs.bench_load import LOADS, Load, Record, Traffic, fill, past_ms, random_checkpoint
from jobs.local_servers import KafkaServer, RedisServer, running_kafka, running_redis
from models.checkpoint import Checkpoint, Sizes
from models.errors import VqlError
from models.wire import decode_folded

SHARES = (0.1, 0.5, 0.8)
SOAK_SHARE = 0.5
POISON_SHARE = 0.01
BATCH = 10_000
WARM_EVENTS = 20_000
SETTLE_S = 2.0
END_WAIT_S = 120.0
COMPARED_USERS = 1_000
SIDES = ("floor", "redis", "embedded")
FLOOR_DATABASE = 1
Poisoned = Callable[[Sequence[Record], float, int], list[Record]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamBench:
    """What to measure. repeats: rounds of all sides, of which each one's median counts.

    freshness_s: of each share of capacity; soak_s: of the watch of memory; 0 leaves either out.
    poisoned: records with a share of bad ones between them, by a seed.
    """

    events: int
    loads: tuple[str, ...]
    freshness_s: float
    soak_s: float
    poisoned: Poisoned
    repeats: int = 3
    partitions: int = 4


class Throughput(msgspec.Struct, frozen=True, kw_only=True):
    """Records over busy_s. cpu_us_per_event: of the reading process, without Kafka's and Redis' own."""

    events_per_s: float
    busy_s: float
    cpu_us_per_event: float


class BytesPerEvent(msgspec.Struct, frozen=True, kw_only=True):
    """Of rows written: as the stream does, and had the folded part been written with every put."""

    two_part: float
    whole: float


class Freshness(msgspec.Struct, frozen=True, kw_only=True):
    """From the event's production to a row that holds it, as a reader of Redis sees it. lost: probes never seen."""

    p50_s: float
    p99_s: float
    max_s: float
    events_per_s: float
    probes: int
    lost: int


class Memory(msgspec.Struct, frozen=True, kw_only=True):
    """Resident memory (MiB) of the stream's process over `seconds` at half of its capacity."""

    start: float
    end: float
    max: float
    seconds: float


class PoisonCost(msgspec.Struct, frozen=True, kw_only=True):
    """ratio: records per second with this share of bad ones, over those with none."""

    share: float
    events_per_s: float
    ratio: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One load. ratio_to_floor: events_per_s over the floor's. rows_compared: stream's and floor's, found alike."""

    floor: Throughput
    redis: Throughput
    embedded: Throughput
    ratio_to_floor: dict[str, float]
    bytes_per_event: BytesPerEvent
    freshness: dict[str, Freshness]
    rss_mb: Memory | None
    poison: PoisonCost
    rows_compared: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Bench:
    """The servers, the checkpoint and the folder of a benchmark."""

    plan: StreamBench
    kafka: KafkaServer
    redis: RedisServer
    checkpoint: Checkpoint
    folder: Path
    console: Console

    def say(self, words: str) -> None:
        self.console.print(words, style="dim")

    def new_topic(self, name: str, records: Sequence[Record] = ()) -> str:
        self.kafka.create_topic(name, self.plan.partitions, **{"max.message.bytes": "20000000"})
        fill(self.kafka.address, name, records)
        return name


def run_stream_bench(plan: StreamBench, console: Console) -> dict[str, Any]:
    """All figures, as write_figures takes them: those of the load "skewed" at the top.

    Raises MachineError where Java, Kafka's jars or redis-server are missing, VqlError where a side fails or the rows
    of stream and floor differ.
    """
    started_s, on = time.monotonic(), machine()
    with tempfile.TemporaryDirectory(prefix="vql-bench-") as name:
        folder = Path(name)
        for server in ("kafka", "redis"):
            (folder / server).mkdir()
        console.print("starting Kafka and Redis", style="dim")
        with running_redis(folder / "redis") as redis, running_kafka(folder / "kafka") as kafka:
            with redis.client() as client:
                servers = java_and_kafka() | {"redis-server": client.info("server")["redis_version"]}
            checkpoint = random_checkpoint(folder / "checkpoint", Sizes())
            bench = Bench(plan=plan, kafka=kafka, redis=redis, checkpoint=checkpoint, folder=folder, console=console)
            _warm_up(bench)
            figures = {load: _measure(bench, LOADS[load]) for load in plan.loads}
    skewed = figures.pop("skewed", None)
    return (
        ({} if skewed is None else msgspec.structs.asdict(skewed))
        | figures
        | {
            "machine": on,
            "versions": versions(**servers),
            "config": _config(plan, checkpoint),
            "seconds": round(time.monotonic() - started_s, 1),
        }
    )


def _config(plan: StreamBench, checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "events": plan.events,
        "loads": {name: {"users": LOADS[name].users, "skew": LOADS[name].skew} for name in plan.loads},
        "partitions": plan.partitions,
        "repeats": plan.repeats,
        "batch": BATCH,
        "freshness_s": plan.freshness_s,
        "soak_s": plan.soak_s,
        "sizes": msgspec.structs.asdict(checkpoint.manifest.sizes),
    }


def _warm_up(bench: Bench) -> None:
    """Compile the kernels, which are kept on disk, and let the system read the libraries once."""
    bench.say("warming up")
    topic = bench.new_topic("warm-up", Traffic(LOADS["skewed"]).draw(WARM_EVENTS, past_ms(WARM_EVENTS), 1.0))
    _catch_up(bench, topic, "redis")
    _floor(bench, topic, WARM_EVENTS)


def _measure(bench: Bench, load: Load) -> Figures:
    plan, traffic = bench.plan, Traffic(load, seed=1)
    bench.console.print(f"[bold]{load.name}[/bold]  {plan.events:,} events of {load.users:,} users")
    records = traffic.draw(plan.events, past_ms(plan.events), 1.0)
    topic = bench.new_topic(f"{load.name}", records)
    bad = bench.new_topic(f"{load.name}-poisoned", plan.poisoned(records, POISON_SHARE, 1))
    del records
    rounds = [_round(bench, topic, bad) for _ in range(plan.repeats)]
    compared = _require_equal_rows(bench, traffic.user_ids)
    floor, redis, embedded, poisoned = (
        _median(speeds) for speeds in zip(*(each.speeds for each in rounds), strict=True)
    )
    freshness, memory = _live(bench, topic, traffic, redis.events_per_s)
    last = rounds[-1]
    return Figures(
        floor=floor,
        redis=redis,
        embedded=embedded,
        ratio_to_floor={
            "redis": redis.events_per_s / floor.events_per_s,
            "embedded": embedded.events_per_s / floor.events_per_s,
        },
        bytes_per_event=BytesPerEvent(two_part=last.two_part, whole=last.two_part * last.whole_by_two_part),
        freshness=freshness,
        rss_mb=memory,
        poison=PoisonCost(
            share=POISON_SHARE,
            events_per_s=poisoned.events_per_s,
            ratio=poisoned.events_per_s / redis.events_per_s,
        ),
        rows_compared=compared,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """All sides once, one after the other, so that what else the machine does strikes all of them."""

    speeds: tuple[Throughput, Throughput, Throughput, Throughput]
    two_part: float
    whole_by_two_part: float


def _round(bench: Bench, topic: str, bad: str) -> _Round:
    """Floor, Redis, embedded, poisoned. The rows of floor and Redis stay in their databases."""
    plain = _floor(bench, topic, bench.plan.events)
    poisoned = _speed(_catch_up(bench, bad, "redis"))
    done = _catch_up(bench, topic, "redis")
    speeds = (_floor_speed(plain), _speed(done), _speed(_catch_up(bench, topic, "embedded")), poisoned)
    said = zip((*SIDES, "1 % poison"), speeds, strict=True)
    bench.say("events/s: " + ", ".join(f"{side} {speed.events_per_s:,.0f}" for side, speed in said))
    return _Round(
        speeds=speeds,
        two_part=done["bytes_written"] / done["events_folded"],
        whole_by_two_part=plain.whole_bytes / plain.two_part_bytes,
    )


def _median(speeds: Sequence[Throughput]) -> Throughput:
    return sorted(speeds, key=lambda speed: speed.events_per_s)[len(speeds) // 2]


def _floor(bench: Bench, topic: str, events: int) -> FloorDone:
    with bench.redis.client() as client:
        client.flushall()
    job = FloorJob(
        kafka=bench.kafka.address,
        topic=topic,
        partitions=bench.plan.partitions,
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


def _floor_speed(done: FloorDone) -> Throughput:
    return Throughput(
        events_per_s=done.events / done.busy_s,
        busy_s=done.busy_s,
        cpu_us_per_event=done.busy_cpu_s / done.events * 1e6,
    )


def _speed(done: dict[str, Any]) -> Throughput:
    return Throughput(
        events_per_s=done["records_read"] / done["busy_s"],
        busy_s=done["busy_s"],
        cpu_us_per_event=done["busy_cpu_s"] / done["records_read"] * 1e6,
    )


def _catch_up(bench: Bench, topic: str, store: Literal["redis", "embedded"]) -> dict[str, Any]:
    """Stream a topic from its first record to its end into an empty store; what the stream said when it ended."""
    if store == "redis":
        with bench.redis.client() as client:
            client.flushdb()
    with _streaming(bench, topic, store, "--from", "earliest", "--until", "end") as running:
        running.process.wait()
        return running.ended()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Running:
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
def _streaming(bench: Bench, topic: str, store: str, *options: str) -> Iterator[_Running]:
    """`vql stream` on a state folder of its own; ended with the context, if it still runs."""
    state = Path(tempfile.mkdtemp(dir=bench.folder))
    (state / "log").mkdir()
    command = [sys.executable, "-m", "jobs.cli", "stream", "--topic", topic, *options]
    for option, path in {"checkpoint": bench.checkpoint.path, "log": state / "log", "state": state}.items():
        command += [f"--{option}", str(path)]
    log = state / "stream.err"
    with log.open("wb") as err:
        process = subprocess.Popen(command, env=_environment(bench, store), stdout=subprocess.DEVNULL, stderr=err)
    try:
        yield _Running(process=process, log=log)
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def _environment(bench: Bench, store: str | None) -> dict[str, str]:
    """This process's without the product's variables, which name other servers."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("VQL_") or name == "VQL_JARS"}
    redis = {"VQL_REDIS_URL": bench.redis.url} if store == "redis" else {}
    return kept | {"VQL_KAFKA_BOOTSTRAP_SERVERS": bench.kafka.address} | redis


def _require_equal_rows(bench: Bench, user_ids: Sequence[str]) -> int:
    """How many rows were compared. Raises VqlError for one that stream and floor have not made alike."""
    chosen = list(user_ids[:: max(1, len(user_ids) // COMPARED_USERS)])
    store = StoreHandle(state=bench.folder, redis=RedisSettings(url=bench.redis.url)).open()
    streamed = store.get_rows(bench.checkpoint.checkpoint_id, chosen)
    store.close()
    with bench.redis.client() as client:
        client.select(FLOOR_DATABASE)
        parts = client.mget([key for user_id in chosen for key in row_keys(user_id)])
    compared = 0
    for user_id, row, folded, recent in zip(chosen, streamed, parts[::2], parts[1::2], strict=True):
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


def _live(bench: Bench, topic: str, traffic: Traffic, capacity: float) -> tuple[dict[str, Freshness], Memory | None]:
    """Freshness at shares of the capacity, and memory over a longer time, of a stream that goes on where one ended."""
    site = Site(kafka=bench.kafka, redis=bench.redis, topic=topic, checkpoint_id=bench.checkpoint.checkpoint_id)
    fresh: dict[str, Freshness] = {}
    memory = None
    with _streaming(bench, topic, "redis", "--until", "forever") as running:
        # Until it has started, events only wait.
        offer(site, traffic, 100.0, SETTLE_S)
        for share in SHARES if bench.plan.freshness_s else ():
            seen = offer(site, traffic, share * capacity, bench.plan.freshness_s)
            figure = fresh[f"{share:g}"] = Freshness(
                p50_s=percentile_s(seen.latency_s, 50),
                p99_s=percentile_s(seen.latency_s, 99),
                max_s=percentile_s(seen.latency_s, 100),
                events_per_s=seen.events_per_s,
                probes=len(seen.latency_s),
                lost=seen.lost,
            )
            bench.say(f"freshness at {share:.0%}: p50 {figure.p50_s:.2f} s, p99 {figure.p99_s:.2f} s")
        if bench.plan.soak_s:
            with resident_mb(running.process.pid) as sampled_mb:
                offer(site, traffic, SOAK_SHARE * capacity, bench.plan.soak_s)
            memory = Memory(start=sampled_mb[0], end=sampled_mb[-1], max=max(sampled_mb), seconds=bench.plan.soak_s)
            bench.say(f"memory: {memory.start:,.0f} MiB, at the end {memory.end:,.0f}")
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(END_WAIT_S)
        running.ended()
    return fresh, memory


def table_rows(figures: dict[str, Any], loads: Sequence[str]) -> dict[str, list[str]]:
    """The figures by name, a column for each load."""
    of = {load: figures if load == "skewed" else msgspec.structs.asdict(figures[load]) for load in loads}
    rows = {f"{side}, events/s": [f"{each[side].events_per_s:,.0f}" for each in of.values()] for side in SIDES}
    for side in ("redis", "embedded"):
        rows[f"{side} / floor"] = [f"{each['ratio_to_floor'][side]:.0%}" for each in of.values()]
    rows["bytes/event, in two parts"] = [f"{each['bytes_per_event'].two_part:,.0f}" for each in of.values()]
    rows["bytes/event, whole rows"] = [f"{each['bytes_per_event'].whole:,.0f}" for each in of.values()]
    rows["events/s with 1 % poison / without"] = [f"{each['poison'].ratio:.0%}" for each in of.values()]
    for share in next(iter(of.values()))["freshness"]:
        fresh = [each["freshness"][share] for each in of.values()]
        rows[f"event to visible at {float(share):.0%}, p50, p99"] = [f"{f.p50_s:.2f} s, {f.p99_s:.2f} s" for f in fresh]
    if all(each["rss_mb"] for each in of.values()):
        memory = [each["rss_mb"] for each in of.values()]
        rows["memory, start, end, max (MiB)"] = [f"{m.start:,.0f}, {m.end:,.0f}, {m.max:,.0f}" for m in memory]
    return rows
