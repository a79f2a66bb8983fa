"""The benchmark of the ranker: what it costs to score a user's candidates, by the length of the user's history.

Every side fetches what it needs of the user from the same Redis, on the same cores, and scores the same candidates.
Sides and lengths take turns in rounds, so that what else the machine does strikes all of them.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from rich.console import Console

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.redis_settings import RedisSettings
from feature_repo.store import Backfill, RowStore, whole_put
from jobs.bench import machine, versions
from jobs.bench_load import ITEMS, random_history
from jobs.bench_rank_sides import (
    ExactHistory,
    Raw,
    RawHistories,
    Side,
    Vql,
    as_request,
    bench_shape,
    rival,
    scoring_checkpoint,
)
from jobs.local_servers import running_redis
from jobs.scoring import Asked, load_scorer
from models.checkpoint import Sizes
from models.errors import VqlError
from models.ranker import Ranker, Shape, VqlHistory
from models.rivals.din import WINDOW, DinHistory
from models.row import Fold, advance, new_row
from models.wire import Stamp

SIDES = ("vql", "full_attention", "din_50")
END_MS = 1_700_000_000_000
# Logits of random parameters are of the order of one.
TOLERANCE = 1e-4
WARM = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class RankBench:
    """What to measure. seconds: about how long each side is measured at each length and number of candidates."""

    lengths: Sequence[int] = (1_000, 10_000, 100_000)
    candidates: Sequence[int] = (100, 500)
    users: int = 8
    rounds: int = 10
    seconds: float = 5.0


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """One user's request, fetch included. fetch_ms and score_ms are medians of its two parts."""

    p50_ms: float
    p99_ms: float
    fetch_ms: float
    score_ms: float
    requests: int


def run_rank_bench(plan: RankBench, console: Console) -> dict[str, Any]:
    """All figures, as write_figures takes them.

    Raises MachineError without redis-server, VqlError where a side does not compute what it should.
    """
    started_s, on = time.monotonic(), machine()
    shape = bench_shape(Sizes())
    # As in `vql serve`; more would help only on idle cores.
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="vql-bench-") as name:
        folder = Path(name)
        (folder / "redis").mkdir()
        console.print("starting Redis, making histories", style="dim")
        with running_redis(folder / "redis") as redis, redis.client() as client:
            checkpoint = scoring_checkpoint(folder / "checkpoint", shape)
            fold = checkpoint.fold()
            rows = StoreHandle(state=folder, redis=RedisSettings(url=redis.url)).open()
            scorer = load_scorer(checkpoint, fold, Reader(rows, Opened(checkpoint)))
            histories = RawHistories(client)
            row_bytes = {str(length): _fill(plan, length, fold, rows, histories) for length in plan.lengths}
            # Of a store that nothing was recorded in, the reader would say that it was emptied.
            users, events = plan.users * len(plan.lengths), plan.users * sum(plan.lengths)
            record = Backfill(epoch=1, cut={0: 0}, users=users, events=events, log="benchmark")
            rows.record_backfill(checkpoint.checkpoint_id, record)
            sides = _sides(Vql(scorer=scorer), histories, shape)
            _check(plan, sides, scorer.ranker)
            latency = {str(count): _measure(plan, count, sides, console) for count in plan.candidates}
            server = client.info("server")["redis_version"]
    first, last = str(min(plan.lengths)), str(max(plan.lengths))
    return {
        "latency": latency,
        "flatness": {
            count: {side: by[side][last].p50_ms / by[side][first].p50_ms for side in SIDES}
            for count, by in latency.items()
        },
        "row_bytes": row_bytes,
        "machine": on,
        "versions": versions(**{"torch": str(torch.__version__), "redis-server": server}),
        "config": {
            "lengths": list(plan.lengths),
            "candidates": list(plan.candidates),
            "users": plan.users,
            "rounds": plan.rounds,
            "items": ITEMS,
            "threads": torch.get_num_threads(),
            "sizes": msgspec.structs.asdict(shape.sizes),
        },
        "seconds": round(time.monotonic() - started_s, 1),
    }


def _fill(plan: RankBench, length: int, fold: Fold, rows: RowStore, histories: RawHistories) -> float:
    """Users with histories of this length, as rows and raw; the mean bytes of a row."""
    rng, position = np.random.default_rng(length), Stamp(epoch=1, partition=0, offset=-1)
    sizes = []
    for user in range(plan.users):
        events = random_history(rng, length, END_MS)
        row, _ = advance(new_row(fold.spec, 1, 0), events, position, fold)
        rows.put_rows(fold.spec.checkpoint_id, [whole_put(_user(length, user), row)])
        histories.put(_user(length, user), events)
        sizes.append(row.size_bytes)
    return float(np.mean(sizes))


def _user(length: int, user: int) -> str:
    return f"user-{length}-{user}"


def _sides(vql: Vql, histories: RawHistories, shape: Shape) -> dict[str, Side]:
    ranker, table = vql.scorer.ranker, vql.scorer.table
    assert isinstance(ranker.history, VqlHistory)
    with torch.inference_mode():
        exact = ExactHistory(ranker.history, ranker.encoder(torch.arange(len(table))))
    return {
        "vql": vql,
        "full_attention": Raw(ranker=rival(ranker, exact, shape), table=table, histories=histories, newest=0),
        "din_50": Raw(ranker=rival(ranker, DinHistory(shape), shape), table=table, histories=histories, newest=WINDOW),
    }


def _check(plan: RankBench, sides: Mapping[str, Side], ranker: Ranker) -> None:
    """VQL's scores are those of quantised attention over the raw events, and the fused rival's of plain attention."""
    full = sides["full_attention"]
    assert isinstance(full, Raw)
    asked = _asked(np.random.default_rng(0), _user(min(plan.lengths), 0), 20)
    request = as_request(asked, full.histories.newest(asked.user_id), full.table)
    with torch.inference_mode():
        quantised = ranker(request)[0][0]
        history = ranker.history
        assert isinstance(history, VqlHistory)
        history.codebook.started.fill_(False)
        exact = ranker(request)[0][0]
        history.codebook.started.fill_(True)
    for name, wanted in (("vql", quantised), ("full_attention", exact)):
        worst = float((sides[name].score(asked).logit_C - wanted).abs().max())
        if not worst <= TOLERANCE:
            raise VqlError(f"the scores of {name} differ from plain attention by {worst:g}; nothing was measured")


def _asked(rng: np.random.Generator, user_id: str, candidates: int) -> Asked:
    item_ids = [f"item-{n}" for n in rng.integers(1, ITEMS + 1, candidates)]
    return Asked(user_id=user_id, item_ids=item_ids, now_ms=END_MS + 1)


def _measure(
    plan: RankBench, candidates: int, sides: Mapping[str, Side], console: Console
) -> dict[str, dict[str, Latency]]:
    """Latency by side and length."""
    rng = np.random.default_rng(candidates)
    seconds: dict[tuple[str, int], list[tuple[float, float]]] = {(s, n): [] for s in sides for n in plan.lengths}

    def timed(name: str, length: int) -> tuple[float, float]:
        done = sides[name].score(_asked(rng, _user(length, int(rng.integers(plan.users))), candidates))
        return done.fetch_s, done.score_s

    for _ in range(plan.rounds):
        for (name, length), taken in seconds.items():
            for _ in range(WARM):
                timed(name, length)
            end_s = time.monotonic() + plan.seconds / plan.rounds
            taken.append(timed(name, length))
            while time.monotonic() < end_s:
                taken.append(timed(name, length))
    found: dict[str, dict[str, Latency]] = {}
    for (name, length), taken in seconds.items():
        found.setdefault(name, {})[str(length)] = latency = _latency(taken)
        console.print(f"{candidates} candidates, {length:,} events, {name}: p50 {latency.p50_ms:.2f} ms", style="dim")
    return found


def _latency(taken: Sequence[tuple[float, float]]) -> Latency:
    fetch_N, score_N = np.array(taken).T * 1000
    return Latency(
        p50_ms=float(np.percentile(fetch_N + score_N, 50)),
        p99_ms=float(np.percentile(fetch_N + score_N, 99)),
        fetch_ms=float(np.median(fetch_N)),
        score_ms=float(np.median(score_N)),
        requests=len(taken),
    )


def table_rows(figures: Mapping[str, Any]) -> dict[str, list[str]]:
    """The figures by name, a column for each length."""
    rows: dict[str, list[str]] = {}
    for count, by in figures["latency"].items():
        for side in SIDES:
            rows[f"{side}, {count} candidates, p50 (p99) ms"] = [
                f"{latency.p50_ms:,.2f} ({latency.p99_ms:,.2f})" for latency in by[side].values()
            ]
    rows["bytes of a row"] = [f"{size:,.0f}" for size in figures["row_bytes"].values()]
    return rows
