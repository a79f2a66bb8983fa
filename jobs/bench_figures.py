"""The figures of the benchmark of the stream: what each says, and a table of them for people."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

SIDES = ("floor", "redis", "embedded")


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
    """Resident memory (MiB) of the stream's process over `seconds` at half of its capacity.

    Its rows in memory grow with their users' histories, up to --row-cache-mb; by_minute tells that from a leak.
    """

    start: float
    end: float
    max: float
    by_minute: list[float]
    seconds: float


class PoisonCost(msgspec.Struct, frozen=True, kw_only=True):
    """ratio: records per second with this share of bad ones, over those with none, median of rounds."""

    share: float
    events_per_s: float
    ratio: float


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """One load. ratio_to_floor: events_per_s over the floor's, median of rounds.

    rows_compared: stream's and floor's, found alike.
    """

    floor: Throughput
    redis: Throughput
    embedded: Throughput
    ratio_to_floor: dict[str, float]
    bytes_per_event: BytesPerEvent
    freshness: dict[str, Freshness]
    rss_mb: Memory | None
    poison: PoisonCost
    rows_compared: int


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
