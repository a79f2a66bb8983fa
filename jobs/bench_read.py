"""The benchmark of the reader: from user ids to tensors, beside the raw multi-get of the same bytes and beside Feast.

All sides read the same users from the same redis-server in turns, so that what else the machine does strikes them
alike. The server runs on the same cores. The multi-get is the floor: it gives strings and checks nothing. Feast's
`get_online_features` gives the same bytes by its own API, on the product's own store, and makes no tensors; the same
with each row decoded and folded by itself (feast_to_tensors) does what the reader does.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import redis
import torch
from rich.console import Console

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader, ReadLimits
from feature_repo.redis_settings import RedisSettings
from jobs.bench import machine, versions
from jobs.bench_load import random_checkpoint
from jobs.bench_read_rows import Layout, realistic_rows, store_rows
from jobs.local_servers import RedisServer, running_redis
from models.attention import CacheBatch
from models.checkpoint import Checkpoint, Sizes
from models.dense_caches import dense_caches
from models.errors import VqlError
from models.newest import newest_of
from models.row import Fold, Row, RowBytes, decode_row, whole_cache

BATCHES = (1, 10, 100, 500)
FLOOR, READER, FEAST, CODEWORDS = "raw", "reader", "feast", "feature_per_codeword"
FEAST_TENSORS = "feast_to_tensors"
# Of so many calls of the other sides, these have one: they take many times longer.
ONE_IN = {FLOOR: 1, READER: 1, FEAST: 5, FEAST_TENSORS: 10, CODEWORDS: 20}
STRINGS_DATABASE, CODEWORDS_DATABASE = 1, 2
DEADLINE_S = 5.0
WARM_CALLS = 5
COMPARED_USERS = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadBench:
    """What to measure. calls: of a batch of one user; larger batches get fewer."""

    users: int = 1_000
    calls: int = 1_000
    batches: tuple[int, ...] = BATCHES


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Of so many calls."""

    p50_ms: float
    p99_ms: float
    calls: int


class Ratios(msgspec.Struct, frozen=True, kw_only=True):
    """Of medians, at one size of batch."""

    reader_over_raw: float
    feast_over_reader: float
    feast_to_tensors_over_reader: float
    feature_per_codeword_over_reader: float


class RowFigures(msgspec.Struct, frozen=True, kw_only=True):
    """What was read: bytes of rows, and the events and codewords in them."""

    bytes_p50: float
    bytes_p99: float
    bytes_mean: float
    events_p50: float
    codewords_p50: float


def run_read_bench(plan: ReadBench, console: Console) -> dict[str, Any]:
    """All figures, as write_figures takes them.

    Raises MachineError where redis-server is missing, VqlError where a read differs from rows decoded one by one.
    """
    started_s, on = time.monotonic(), machine()
    with tempfile.TemporaryDirectory(prefix="vql-bench-") as name:
        folder = Path(name)
        with running_redis(folder) as server:
            checkpoint = random_checkpoint(folder / "checkpoint", Sizes())
            with _sides(plan, checkpoint, server, folder, console) as (sides, reader, rows):
                compared = _require_equal(reader, rows)
                batches: dict[str, dict[str, Latency]] = {}
                for batch in plan.batches:
                    console.print(f"reading {batch} users at a time", style="dim")
                    batches[str(batch)] = _measure(sides, list(rows), batch, plan.calls)
                parts = _parts(reader, list(rows)[: min(100, len(rows))])
            with server.client() as client:
                servers = {"redis-server": client.info("server")["redis_version"]}
    return {
        **batches,
        "ratios": {batch: _ratios(sides) for batch, sides in batches.items()},
        "rows": _row_figures(rows),
        "parts_of_100_users_ms": parts,
        "rows_compared": compared,
        "machine": on,
        "versions": versions(**servers),
        "config": {"users": plan.users, "calls": plan.calls, "sizes": checkpoint.manifest.sizes},
        "seconds": round(time.monotonic() - started_s, 1),
    }


Side = Callable[[Sequence[str]], object]


@contextmanager
def _sides(
    plan: ReadBench, checkpoint: Checkpoint, server: RedisServer, folder: Path, console: Console
) -> Iterator[tuple[dict[str, Side], Reader, dict[str, Row]]]:
    """What reads, by name, each from its own layout of the same rows."""
    opened = Opened(checkpoint)
    console.print(f"making the rows of {plan.users:,} users", style="dim")
    rows = realistic_rows(opened.fold, plan.users)
    settings = RedisSettings(url=server.url)
    reader = Reader(
        StoreHandle(state=folder, redis=settings).for_reader(DEADLINE_S).open(),
        opened,
        ReadLimits(deadline_s=DEADLINE_S),
    )
    store_rows(reader.rows, checkpoint.checkpoint_id, rows)
    codes = checkpoint.spec.groups * checkpoint.spec.codewords
    strings, codewords = (
        Layout(client=redis.Redis(port=server.port, db=database, socket_timeout=DEADLINE_S), codes=codes)
        for database in (STRINGS_DATABASE, CODEWORDS_DATABASE)
    )
    strings.store_strings(rows)
    codewords.store_codewords(rows)
    console.print("importing Feast", style="dim")
    with _environment(VQL_REDIS_URL=server.url, VQL_STATE=str(folder)):
        feast = _feast(folder, checkpoint.checkpoint_id)
        sides = {
            FLOOR: strings.read_strings,
            READER: reader.read,
            FEAST: feast,
            FEAST_TENSORS: lambda user_ids: _plain_tensors(feast(user_ids).to_dict(), opened.fold),
            CODEWORDS: codewords.read_codewords,
        }
        try:
            yield sides, reader, rows
        finally:
            reader.close()
            strings.client.close()
            codewords.client.close()


def _plain_tensors(served: Mapping[str, Any], using: Fold) -> CacheBatch:
    """What Feast answers as tensors, a row at a time."""
    pairs = zip(served["folded"], served["recent"], strict=True)
    rows = [decode_row(RowBytes(folded=folded, recent=recent), using.spec) for folded, recent in pairs]
    return CacheBatch.of(using.spec, [whole_cache(row, using) for row in rows], newest=newest_of(rows, using))


def _feast(state: Path, checkpoint_id: str) -> Callable[[Sequence[str]], Any]:
    """Feast's own way to the same bytes, without a conversion of what it answers."""
    from feature_repo.repo import open_repo, register
    from feature_repo.views import service_name

    store = open_repo(state)
    register(store, checkpoint_id)
    service = store.get_feature_service(service_name(checkpoint_id))
    return lambda user_ids: store.get_online_features(service, [{"user_id": user_id} for user_id in user_ids])


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """These variables, for as long as the context lasts."""
    before = dict(os.environ)
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _measure(sides: Mapping[str, Side], user_ids: Sequence[str], batch: int, calls: int) -> dict[str, Latency]:
    """The sides in turns, each call with other users, and each turn with another order."""
    rng = np.random.default_rng(batch)
    rounds = max(2 * max(ONE_IN.values()), int(calls / batch**0.4))
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(-WARM_CALLS, rounds):
        chosen = [user_ids[u] for u in rng.choice(len(user_ids), batch, replace=batch > len(user_ids))]
        for name in rng.permutation(list(sides)):
            if turn >= 0 and turn % ONE_IN[name]:
                continue
            started_s = time.perf_counter()
            sides[name](chosen)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - started_s)
    return {name: _latency(each) for name, each in seconds.items()}


def _ratios(sides: Mapping[str, Latency]) -> Ratios:
    reader = sides[READER].p50_ms
    return Ratios(
        reader_over_raw=round(reader / sides[FLOOR].p50_ms, 2),
        feast_over_reader=round(sides[FEAST].p50_ms / reader, 2),
        feast_to_tensors_over_reader=round(sides[FEAST_TENSORS].p50_ms / reader, 2),
        feature_per_codeword_over_reader=round(sides[CODEWORDS].p50_ms / reader, 2),
    )


def _latency(seconds: Sequence[float]) -> Latency:
    p50_ms, p99_ms = np.percentile(seconds, [50, 99]) * 1000
    return Latency(p50_ms=round(float(p50_ms), 3), p99_ms=round(float(p99_ms), 3), calls=len(seconds))


def _parts(reader: Reader, user_ids: Sequence[str], calls: int = 50) -> dict[str, float]:
    """Where a read's time goes: medians of its steps, each by itself, in this thread."""
    rows = reader.rows.get_rows(reader.checkpoint.checkpoint_id, user_ids)
    using, cpu = reader.fold, torch.device("cpu")
    steps: dict[str, Callable[[], object]] = {
        "rows from the store": lambda: reader.rows.get_rows(reader.checkpoint.checkpoint_id, user_ids),
        "checked, found and folded": lambda: dense_caches(rows, using, cpu),
        "the whole read": lambda: reader.read(user_ids),
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(calls):
        for name, step in steps.items():
            started_s = time.perf_counter()
            step()
            found[name].append(time.perf_counter() - started_s)
    return {name: _latency(seconds).p50_ms for name, seconds in found.items()}


def _require_equal(reader: Reader, rows: Mapping[str, Row]) -> int:
    """How many users were compared. Raises VqlError for a read that is not what their rows say one by one."""
    user_ids = list(rows)[:COMPARED_USERS]
    read = reader.read(user_ids)
    asked, using = [rows[user_id] for user_id in user_ids], reader.fold
    plain = CacheBatch.of(using.spec, [whole_cache(row, using) for row in asked], newest=newest_of(asked, using))
    if not all(torch.equal(getattr(read.caches, name), getattr(plain, name)) for name in CacheBatch.__slots__):
        raise VqlError("a read of a batch differs from its rows decoded one by one: one of them is wrong")
    return len(user_ids)


def _row_figures(rows: Mapping[str, Row]) -> RowFigures:
    sizes = [row.size_bytes for row in rows.values()]
    return RowFigures(
        bytes_p50=float(np.percentile(sizes, 50)),
        bytes_p99=float(np.percentile(sizes, 99)),
        bytes_mean=float(np.mean(sizes)),
        events_p50=float(np.median([row.count for row in rows.values()])),
        codewords_p50=float(np.median([len(row.folded.code_N) for row in rows.values()])),
    )


def table_rows(figures: Mapping[str, Any]) -> dict[str, list[str]]:
    """The figures by name, a column for each size of batch."""
    ratios: Mapping[str, Ratios] = figures["ratios"]
    batches = [figures[batch] for batch in ratios]
    rows = {
        f"{side}, p50, p99 (ms)": [f"{sides[side].p50_ms:.2f}, {sides[side].p99_ms:.2f}" for sides in batches]
        for side in (FLOOR, READER, FEAST, FEAST_TENSORS, CODEWORDS)
    }
    rows["reader / raw"] = [f"{each.reader_over_raw:.2f}" for each in ratios.values()]
    rows["feast / reader"] = [f"{each.feast_over_reader:.1f}" for each in ratios.values()]
    rows["feast_to_tensors / reader"] = [f"{each.feast_to_tensors_over_reader:.1f}" for each in ratios.values()]
    return rows
