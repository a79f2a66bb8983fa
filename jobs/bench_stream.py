"""The benchmark of the stream: throughput against a floor, bytes, freshness, memory and the cost of bad records.

Kafka and Redis run on the same cores as what is measured, and every side reads the same events in the same run. What
else the machine does strikes the sides of a round in turns, so there are several rounds, and each side's median counts.
"""

from __future__ import annotations

import signal
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
from rich.console import Console

from jobs.bench import java_and_kafka, machine, versions
from jobs.bench_figures import SIDES, BytesPerEvent, Figures, Freshness, Memory, PoisonCost, Throughput
from jobs.bench_floor import FloorDone
from jobs.bench_live import RSS_INTERVAL_S, Site, offer, percentile_s, resident_mb
from jobs.bench_load import LOADS, Load, Record, Traffic, past_ms, random_checkpoint
from jobs.bench_sides import BATCH, Bench, catch_up, require_equal_rows, run_floor, streaming
from jobs.local_servers import running_kafka, running_redis
from models.checkpoint import Checkpoint, Sizes

SHARES = (0.1, 0.5, 0.8)
SOAK_SHARE = 0.5
POISON_SHARE = 0.01
WARM_EVENTS = 20_000
SETTLE_S = 2.0
END_WAIT_S = 120.0
Poisoned = Callable[[Sequence[Record], float, int], list[Record]]


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamBench:
    """What to measure. repeats: rounds of all sides, of which each one's median counts.

    freshness_s: of each share of capacity; soak_s: of the watch of memory; 0 leaves either out.
    poisoned: records with a share of bad ones between them, by a seed. row_cache_mb: None for the stream's default.
    """

    events: int
    loads: tuple[str, ...]
    freshness_s: float
    soak_s: float
    poisoned: Poisoned
    repeats: int = 3
    partitions: int = 4
    row_cache_mb: int | None = None


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
            bench = Bench(
                partitions=plan.partitions,
                kafka=kafka,
                redis=redis,
                checkpoint=checkpoint,
                folder=folder,
                console=console,
                options=() if plan.row_cache_mb is None else ("--row-cache-mb", str(plan.row_cache_mb)),
            )
            _warm_up(bench)
            figures = {load: _measure(bench, plan, LOADS[load]) for load in plan.loads}
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
        "row_cache_mb": plan.row_cache_mb,
        "freshness_s": plan.freshness_s,
        "soak_s": plan.soak_s,
        "sizes": msgspec.structs.asdict(checkpoint.manifest.sizes),
    }


def _warm_up(bench: Bench) -> None:
    """Compile the kernels, which are kept on disk, and let the system read the libraries once."""
    bench.say("warming up")
    topic = bench.new_topic("warm-up", Traffic(LOADS["skewed"]).draw(WARM_EVENTS, past_ms(WARM_EVENTS), 1.0))
    catch_up(bench, topic, "redis")
    run_floor(bench, topic, WARM_EVENTS)


def _measure(bench: Bench, plan: StreamBench, load: Load) -> Figures:
    traffic = Traffic(load, seed=1)
    bench.console.print(f"[bold]{load.name}[/bold]  {plan.events:,} events of {load.users:,} users")
    records = traffic.draw(plan.events, past_ms(plan.events), 1.0)
    topic = bench.new_topic(f"{load.name}", records)
    bad = bench.new_topic(f"{load.name}-poisoned", plan.poisoned(records, POISON_SHARE, 1))
    del records
    rounds = [_round(bench, plan, topic, bad) for _ in range(plan.repeats)]
    compared = require_equal_rows(bench, traffic.user_ids)
    sides = ([each.floor, each.redis, each.embedded, each.poisoned] for each in rounds)
    floor, redis, embedded, poisoned = map(_median, zip(*sides, strict=True))
    freshness, memory = _live(bench, plan, topic, traffic, redis.events_per_s)
    return Figures(
        floor=floor,
        redis=redis,
        embedded=embedded,
        # Of each round's own ratio, which what else the machine does blurs least.
        ratio_to_floor={
            "redis": median(each.redis.events_per_s / each.floor.events_per_s for each in rounds),
            "embedded": median(each.embedded.events_per_s / each.floor.events_per_s for each in rounds),
        },
        bytes_per_event=rounds[-1].bytes_per_event,
        freshness=freshness,
        rss_mb=memory,
        poison=PoisonCost(
            share=POISON_SHARE,
            events_per_s=poisoned.events_per_s,
            ratio=median(each.poisoned.events_per_s / each.redis.events_per_s for each in rounds),
        ),
        rows_compared=compared,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Round:
    """All sides once, one after the other, so that what else the machine does strikes all of them."""

    floor: Throughput
    redis: Throughput
    embedded: Throughput
    poisoned: Throughput
    bytes_per_event: BytesPerEvent


def _round(bench: Bench, plan: StreamBench, topic: str, bad: str) -> _Round:
    """Floor, Redis, embedded, poisoned. The rows of floor and Redis stay in their databases."""
    plain = run_floor(bench, topic, plan.events)
    poisoned = _speed(catch_up(bench, bad, "redis"))
    done = catch_up(bench, topic, "redis")
    speeds = (_floor_speed(plain), _speed(done), _speed(catch_up(bench, topic, "embedded")), poisoned)
    said = zip((*SIDES, "1 % poison"), speeds, strict=True)
    bench.say("events/s: " + ", ".join(f"{side} {speed.events_per_s:,.0f}" for side, speed in said))
    floor, redis, embedded, poisoned = speeds
    return _Round(
        floor=floor,
        redis=redis,
        embedded=embedded,
        poisoned=poisoned,
        bytes_per_event=BytesPerEvent(
            two_part=done["bytes_written"] / done["events_folded"], whole=done["row_bytes"] / done["events_folded"]
        ),
    )


def _median(speeds: Sequence[Throughput]) -> Throughput:
    return sorted(speeds, key=lambda speed: speed.events_per_s)[len(speeds) // 2]


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


def _live(
    bench: Bench, plan: StreamBench, topic: str, traffic: Traffic, capacity: float
) -> tuple[dict[str, Freshness], Memory | None]:
    """Freshness at shares of the capacity, and memory over a longer time, of a stream that goes on where one ended."""
    site = Site(kafka=bench.kafka, redis=bench.redis, topic=topic, checkpoint_id=bench.checkpoint.checkpoint_id)
    fresh: dict[str, Freshness] = {}
    memory = None
    with streaming(bench, topic, "redis", "--until", "forever") as running:
        # Until it has started, events only wait.
        offer(site, traffic, 100.0, SETTLE_S)
        for share in SHARES if plan.freshness_s else ():
            seen = offer(site, traffic, share * capacity, plan.freshness_s)
            figure = fresh[f"{share:g}"] = Freshness(
                p50_s=percentile_s(seen.latency_s, 50),
                p99_s=percentile_s(seen.latency_s, 99),
                max_s=percentile_s(seen.latency_s, 100),
                events_per_s=seen.events_per_s,
                probes=len(seen.latency_s),
                lost=seen.lost,
            )
            bench.say(f"freshness at {share:.0%}: p50 {figure.p50_s:.2f} s, p99 {figure.p99_s:.2f} s")
        if plan.soak_s:
            with resident_mb(running.process.pid) as sampled_mb:
                offer(site, traffic, SOAK_SHARE * capacity, plan.soak_s)
            memory = Memory(
                start=sampled_mb[0],
                end=sampled_mb[-1],
                max=max(sampled_mb),
                by_minute=sampled_mb[:: round(60 / RSS_INTERVAL_S)],
                seconds=plan.soak_s,
            )
            bench.say(f"memory: {memory.start:,.0f} MiB, at the end {memory.end:,.0f}")
        running.process.send_signal(signal.SIGTERM)
        running.process.wait(END_WAIT_S)
        running.ended()
    return fresh, memory
