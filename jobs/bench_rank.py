"""The benchmark of the ranker: what it costs to score a user's candidates, by the length of the user's history.

Every side fetches what it needs of the user from the same Redis, on the same cores, and scores the same candidates.
Sides and lengths take turns in rounds, so that what else the machine does strikes all of them. Nothing is measured
before each side has given the scores that it should.
"""

from __future__ import annotations

import math
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader, ReadLimits
from feature_repo.redis_settings import RedisSettings
from jobs.bench import machine, versions
from jobs.bench_load import ITEMS
from jobs.bench_rank_sides import Side, bench_shape, scoring_checkpoint, shipped_shape
from jobs.bench_rank_timing import Ask, Latency, from_clients, one_at_a_time
from jobs.bench_rank_users import SIDES, ask, fill_users, make_sides, require_equal, user_id
from jobs.local_servers import RedisServer, running_redis
from jobs.scoring import Scorer, load_scorer, placed
from models.checkpoint import Sizes
from models.ranker import Shape

# Rows are read as `vql serve` reads them, by a thread with a deadline, but never late: kernels are compiled meanwhile.
DEADLINE_S = 120.0
RACED = ("vql", "full")


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBench:
    """What to measure. seconds: about how long each side is measured, at each length, number of candidates or clients.

    ladder: more lengths at which full attention is measured beside VQL, to find where their costs cross.
    clients: how many at a time, of users with clients_length events.
    """

    lengths: Sequence[int] = (1_000, 10_000, 100_000)
    ladder: Sequence[int] = (30, 100, 300, 3_000)
    candidates: int = 500
    few_candidates: int = 100
    clients: Sequence[int] = (1, 8, 32)
    clients_length: int = 10_000
    users: int = 8
    rounds: int = 10
    seconds: float = 5.0
    device: str = "cpu"

    @property
    def raced_lengths(self) -> list[int]:
        return sorted({*self.lengths, *self.ladder})


def run_rank_bench(plan: RankBench, console: Console) -> dict[str, Any]:
    """All figures, as write_figures takes them; those of a side, by length, are under its name.

    Raises InputError for a device that cannot be used, MachineError without redis-server, VqlError where a side does
    not compute what it should.
    """
    started_s, on, placement = time.monotonic(), machine(), placed(plan.device, "float32")
    shape = bench_shape(Sizes())
    # As in `vql serve`; more would help only on idle cores.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="vql-bench-") as name:
        folder = Path(name)
        (folder / "redis").mkdir()
        console.print("starting Redis, making histories", style="dim")
        with running_redis(folder / "redis") as server, server.client() as client, ExitStack() as opened:

            def scorer(name: str, shape: Shape) -> Scorer:
                checkpoint = Opened(scoring_checkpoint(folder / name, shape))
                store = StoreHandle(state=folder, redis=RedisSettings(url=server.url)).for_reader(DEADLINE_S).open()
                reader = Reader(store, checkpoint, ReadLimits(deadline_s=DEADLINE_S), placement.device)
                opened.enter_context(closing(reader))
                return load_scorer(checkpoint.checkpoint, reader.fold, reader, placement)

            made = make_sides(scorer("vql", shape), scorer("shipped", shipped_shape(Sizes())), client, shape)
            lengths = sorted({*plan.raced_lengths, plan.clients_length})
            row_bytes = fill_users(lengths, plan.users, made)
            rng = np.random.default_rng(0)
            require_equal(made, [ask(rng, user_id(min(plan.lengths), user), 20) for user in range(2)])
            figures = _figures(plan, made.sides, server, console)
            on_server = client.info("server")["redis_version"]
    return figures | {
        "row_bytes": row_bytes,
        "machine": on,
        "versions": versions(**{"torch": str(torch.__version__), "redis-server": on_server}),
        "config": msgspec.to_builtins(plan)
        | {"items": ITEMS, "threads": torch.get_num_threads(), "sizes": msgspec.structs.asdict(shape.sizes)},
        "seconds": round(time.monotonic() - started_s, 1),
    }


def _figures(plan: RankBench, sides: Mapping[str, Side], server: RedisServer, console: Console) -> dict[str, Any]:
    def asker(candidates: int) -> Ask:
        return lambda rng, length: ask(rng, user_id(length, int(rng.integers(plan.users))), candidates)

    def measure(names: Sequence[str], lengths: Sequence[int], candidates: int) -> dict[str, dict[str, Latency]]:
        console.print(f"{candidates} candidates: {', '.join(names)}", style="dim")
        chosen = {name: sides[name] for name in names}
        return one_at_a_time(chosen, lengths, asker(candidates), client, plan.seconds, plan.rounds)

    with server.client() as client:
        by_side = measure(SIDES, plan.lengths, plan.candidates)
        raced = measure(RACED, plan.raced_lengths, plan.candidates)
        few = measure(SIDES, plan.lengths, plan.few_candidates)
        console.print(f"{', '.join(map(str, plan.clients))} clients at a time", style="dim")
        many = asker(plan.candidates)
        concurrent = from_clients(sides, plan.clients, lambda rng: many(rng, plan.clients_length), plan.seconds)
    first, last = str(min(plan.lengths)), str(max(plan.lengths))
    ms = {name: [raced[name][str(length)].p50_ms for length in plan.raced_lengths] for name in RACED}
    return by_side | {
        "crossover_length": crossover_length(plan.raced_lengths, ms["full"], ms["vql"]),
        "crossover_p50_ms": {name: dict(zip(map(str, plan.raced_lengths), ms[name], strict=True)) for name in RACED},
        "flatness": {name: by_side[name][last].p50_ms / by_side[name][first].p50_ms for name in SIDES},
        "few_candidates": few,
        "concurrent": concurrent,
    }


def crossover_length(lengths: Sequence[int], raw_ms: Sequence[float], cached_ms: Sequence[float]) -> float | None:
    """The length below which raw events are cheaper; None where they never are, or still are at the longest.

    Between two lengths (rising), the logarithm of the ratio of costs is taken for linear in that of the length.
    """
    ratios = [math.log(raw / cached) for raw, cached in zip(raw_ms, cached_ms, strict=True)]
    last = max((n for n, ratio in enumerate(ratios) if ratio < 0), default=-1)
    if last in (-1, len(ratios) - 1):
        return None
    share = ratios[last] / (ratios[last] - ratios[last + 1])
    return lengths[last] * (lengths[last + 1] / lengths[last]) ** share


def table_rows(plan: RankBench, figures: Mapping[str, Any]) -> dict[str, list[str]]:
    """The latencies by name, a column for each length."""
    rows: dict[str, list[str]] = {}
    for count, by_side in ((plan.candidates, figures), (plan.few_candidates, figures["few_candidates"])):
        for name in SIDES:
            rows[f"{name}, {count} candidates, p50 (p99) ms"] = [
                f"{by_side[name][str(n)].p50_ms:,.2f} ({by_side[name][str(n)].p99_ms:,.2f})" for n in plan.lengths
            ]
    for name in SIDES:
        rows[f"{name}, bytes fetched"] = [f"{figures[name][str(n)].bytes:,.0f}" for n in plan.lengths]
    return rows


def client_rows(plan: RankBench, figures: Mapping[str, Any]) -> dict[str, list[str]]:
    """What concurrent clients wait, a column for each number of them."""
    return {
        f"{name}, p50 (p99) ms, requests/s": [
            f"{load.p50_ms:,.1f} ({load.p99_ms:,.1f}), {load.requests_per_s:,.0f}" for load in by_count.values()
        ]
        for name, by_count in figures["concurrent"].items()
    }
