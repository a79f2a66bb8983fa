"""How long requests take in `vql bench rank`: one at a time, and from several clients at once.

Shapes: N requests.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import msgspec
import numpy as np
import redis

from jobs.bench_rank_sides import Side
from jobs.scoring import Asked
from jobs.serving.batches import Batcher, BatchRules

WARM = 1
# Requests that are made beforehand; the clients take them in turns.
PREPARED = 64
TURNS = 2


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One user's request, fetch included; bytes: what Redis sent for it. fetch_ms and score_ms are medians."""

    p50_ms: float
    p99_ms: float
    fetch_ms: float
    score_ms: float
    bytes: float
    requests: int


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What one of several clients waits for an answer, and what all of them get."""

    p50_ms: float
    p99_ms: float
    requests_per_s: float
    requests: int


Ask = Callable[[np.random.Generator, int], Asked]


def one_at_a_time(
    sides: Mapping[str, Side], lengths: Sequence[int], ask: Ask, client: redis.Redis, seconds: float, rounds: int
) -> dict[str, dict[str, Latency]]:
    """By side and length. seconds: of each, in so many rounds. ask: from a length to a request."""
    rng = np.random.default_rng(0)
    taken: dict[tuple[str, int], list[tuple[float, float]]] = {(s, n): [] for n in lengths for s in sides}

    def timed(name: str, length: int) -> tuple[float, float]:
        scores = sides[name].score([ask(rng, length)])
        return scores.read_s, scores.score_s

    for _ in range(rounds):
        for (name, length), times in taken.items():
            for _ in range(WARM):
                timed(name, length)
            end_s = time.monotonic() + seconds / rounds
            times.append(timed(name, length))
            while time.monotonic() < end_s:
                times.append(timed(name, length))
    found: dict[str, dict[str, Latency]] = {name: {} for name in sides}
    for (name, length), times in taken.items():
        found[name][str(length)] = _latency(times, sent_bytes(client, partial(timed, name, length)))
    return found


def _latency(taken: Sequence[tuple[float, float]], size_bytes: float) -> Latency:
    fetch_N, score_N = np.array(taken).T * 1000
    return Latency(
        p50_ms=float(np.percentile(fetch_N + score_N, 50)),
        p99_ms=float(np.percentile(fetch_N + score_N, 99)),
        fetch_ms=float(np.median(fetch_N)),
        score_ms=float(np.median(score_N)),
        bytes=size_bytes,
        requests=len(taken),
    )


def sent_bytes(client: redis.Redis, request: Callable[[], object], times: int = 8) -> float:
    """What the server sent for one request, by its own count and the mean of a few."""

    def sent() -> int:
        return client.info("stats")["total_net_output_bytes"]

    # The answer that tells the first count is in the second one.
    alone = -sent() + sent()
    before = sent()
    for _ in range(times):
        request()
    return (sent() - before - alone) / times


def from_clients(
    sides: Mapping[str, Side], clients: Sequence[int], ask: Callable[[np.random.Generator], Asked], seconds: float
) -> dict[str, dict[str, Load]]:
    """By side and number of clients, each of which asks again as soon as it is answered.

    All sides are served by the same thread and with the same rules of batches as `vql serve`, without its HTTP.
    """
    prepared = [ask(np.random.default_rng(n)) for n in range(PREPARED)]
    waits: dict[tuple[str, int], list[float]] = {(s, n): [] for n in clients for s in sides}
    spent_s = dict.fromkeys(waits, 0.0)
    for _ in range(TURNS):
        for name, count in waits:
            start_s = time.monotonic()
            waits[name, count] += asyncio.run(_served(sides[name], count, prepared, seconds / TURNS))
            spent_s[name, count] += time.monotonic() - start_s
    found: dict[str, dict[str, Load]] = {name: {} for name in sides}
    for (name, count), waited in waits.items():
        found[name][str(count)] = Load(
            p50_ms=float(np.percentile(waited, 50)) * 1000,
            p99_ms=float(np.percentile(waited, 99)) * 1000,
            requests_per_s=len(waited) / spent_s[name, count],
            requests=len(waited),
        )
    return found


async def _served(side: Side, clients: int, prepared: Sequence[Asked], seconds: float) -> list[float]:
    """The seconds that each request took."""
    batcher, requests, waits = Batcher(side.score, BatchRules()), itertools.cycle(prepared), []
    end_s = time.monotonic() + seconds

    async def ask_again() -> None:
        while True:
            start_s = time.perf_counter()
            await batcher.rank([next(requests)])
            waits.append(time.perf_counter() - start_s)
            if time.monotonic() >= end_s:
                return

    try:
        await asyncio.gather(*(ask_again() for _ in range(clients)))
    finally:
        await batcher.close()
    return waits
