"""What a user's row takes, by the number of behaviours, and the memory of Redis for millions of users.

The rows are real: folded by the product's own `advance` from random events, of items by a power law. Without a
checkpoint every code is equally likely, so rows hold more codewords than those of learned codes: figures to plan by
are rather too large. A row holds float32 means; what it would take with float16 means, beside float32 masses, is
computed from the length of its means, for no program writes such rows.

A mix of users has histories of log-normal lengths, spread about as in the demo's purchase log.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import msgspec
import numpy as np
from rich.console import Console

from jobs.bench import figures_table, versions
from jobs.bench_load import ITEM_SKEW, random_checkpoint, random_history
from jobs.size_redis import USER_ID, computed_bytes, installed_redis, measured_bytes
from models.checkpoint import Checkpoint, Sizes, open_checkpoint
from models.errors import InputError
from models.row import Fold, Row, RowBytes, advance, encode_row, new_row
from models.wire import RECENT, Stamp

# The standard deviation of a length's natural logarithm; `pytest tests/jobs/test_size.py` has that of a real log.
LENGTH_SPREAD = 1.5
LENGTH_MAX = 1_000_000
END_MS = 1_750_000_000_000
GIB = 2**30
LENGTH_COLUMNS = ("codewords", "raw events", "folded", "recent", "fp32 row", "in Redis", "fp16 row", "in Redis")


@dataclass(frozen=True, kw_only=True, slots=True)
class SizePlan:
    """What to size. mean_length: events per user of the mix. users: for which the memory of Redis is given.

    rows_each: different rows of each length; mix_rows: of the mix.
    """

    checkpoint: Path | None = None
    lengths: Sequence[int] = (1, 10, 100, 1_000, 10_000, 100_000)
    mean_length: float = 500.0
    users: Sequence[int] = (1_000_000, 10_000_000, 100_000_000)
    rows_each: int = 20
    mix_rows: int = 250


class Stored(msgspec.Struct, frozen=True, kw_only=True):
    """Mean bytes per user: of the row, and of the memory of Redis that it takes."""

    row_bytes: float
    redis_bytes: float


class Size(msgspec.Struct, frozen=True, kw_only=True):
    """Means over users. raw_bytes: their events as a row's recent part would hold them. fp16: of means only."""

    events: float
    codewords: float
    folded_bytes: float
    recent_bytes: float
    raw_bytes: float
    fp32: Stored
    fp16: Stored


def run_size(plan: SizePlan, console: Console) -> dict[str, Any]:
    """All figures, as write_figures takes them.

    Raises InputError for lengths that no user has or a checkpoint without items, CheckpointError for one that is none.
    """
    if wrong := [length for length in (*plan.lengths, plan.mean_length) if not 1 <= length <= LENGTH_MAX]:
        raise InputError(f"a history of {wrong[0]:,.15g} events: give lengths of 1 to {LENGTH_MAX:,}")
    redis = installed_redis()
    console.print(
        f"Redis: measured in redis-server {redis}" if redis else "Redis: computed, not installed", style="dim"
    )
    with tempfile.TemporaryDirectory(prefix="vql-size-") as name:
        checkpoint = _opened(plan.checkpoint, Path(name))
        fold = checkpoint.fold()
        if len(fold.table) < 2:
            raise InputError(f"{checkpoint.path} has no items; run vql encode-items")
    lengths: dict[str, Size] = {}
    for length in plan.lengths:
        console.print(f"users of {length:,} events", style="dim")
        lengths[str(length)] = _size(histories(checkpoint, fold, [length] * plan.rows_each), redis is not None)
    console.print(f"a mix of users of {plan.mean_length:,g} events in the mean", style="dim")
    drawn = mix_lengths(plan.mean_length, plan.mix_rows)
    mix = _size(histories(checkpoint, fold, drawn), redis is not None)
    return {
        "lengths": lengths,
        "mix": mix,
        "mix_lengths": {f"p{p}": float(np.percentile(drawn, p)) for p in (1, 50, 99)},
        "redis_gib": {
            str(users): {kind: users * stored.redis_bytes / GIB for kind, stored in _kinds(mix).items()}
            for users in plan.users
        },
        "redis": "measured" if redis else "computed",
        "checkpoint": None if plan.checkpoint is None else checkpoint.checkpoint_id,
        "versions": versions(**({"redis-server": redis} if redis else {})),
        "config": {
            "sizes": checkpoint.manifest.sizes,
            "rates": checkpoint.spec.rates,
            "items": len(fold.table) - 1,
            "item_skew": ITEM_SKEW,
            "mean_length": plan.mean_length,
            "length_spread": LENGTH_SPREAD,
            "rows_each": plan.rows_each,
            "mix_rows": plan.mix_rows,
            "user_id_bytes": len(USER_ID.format(0)),
        },
    }


def _opened(path: Path | None, folder: Path) -> Checkpoint:
    return random_checkpoint(folder / "checkpoint", Sizes()) if path is None else open_checkpoint(path)


def mix_lengths(mean: float, count: int) -> list[int]:
    """The middles of `count` equal parts of a log-normal distribution of this mean, in whole events of 1 and more."""
    normal = NormalDist(0.0, LENGTH_SPREAD)
    quantile_N = np.exp([normal.inv_cdf((n + 0.5) / count) for n in range(count)])
    return np.clip(np.rint(quantile_N * mean / quantile_N.mean()), 1, LENGTH_MAX).astype(int).tolist()


def histories(checkpoint: Checkpoint, fold: Fold, lengths: Sequence[int]) -> list[Row]:
    """A row for each of these numbers of events."""
    rng, position = np.random.default_rng(0), Stamp(epoch=1, partition=0, offset=-1)
    items, actions = len(fold.table) - 1, len(checkpoint.manifest.actions)
    rows = []
    for length in lengths:
        events = random_history(rng, length, END_MS, items, actions)
        rows.append(advance(new_row(fold.spec, position.epoch, position.partition), events, position, fold)[0])
    return rows


def with_half_means(row: Row) -> RowBytes:
    """Bytes as many as the row's with float16 means. They are no row: only their number is right."""
    data = encode_row(row)
    saved = row.folded.mean_NPRD.nbytes // 2
    return RowBytes(folded=data.folded[: len(data.folded) - saved], recent=data.recent)


def _size(rows: Sequence[Row], measure: bool) -> Size:
    fp32 = [encode_row(row) for row in rows]
    return Size(
        events=_mean([row.count for row in rows]),
        codewords=_mean([len(row.folded.code_N) for row in rows]),
        folded_bytes=_mean([len(data.folded) for data in fp32]),
        recent_bytes=_mean([len(data.recent) for data in fp32]),
        raw_bytes=_mean([row.count * RECENT.itemsize for row in rows]),
        fp32=_stored(rows[0].spec.checkpoint_id, fp32, measure),
        fp16=_stored(rows[0].spec.checkpoint_id, [with_half_means(row) for row in rows], measure),
    )


def _stored(checkpoint_id: str, rows: Sequence[RowBytes], measure: bool) -> Stored:
    return Stored(
        row_bytes=_mean([row.size_bytes for row in rows]),
        redis_bytes=measured_bytes(checkpoint_id, rows) if measure else computed_bytes(rows),
    )


def _mean(numbers: Sequence[int]) -> float:
    return float(np.mean(numbers))


def _kinds(size: Size) -> dict[str, Stored]:
    return {"fp32": size.fp32, "fp16": size.fp16}


def show(figures: Mapping[str, Any], console: Console) -> None:
    """The figures as two tables."""
    rows = {f"{int(length):,}": _columns(size) for length, size in figures["lengths"].items()}
    mix = f"mix, mean {figures['mix'].events:,.0f}"
    console.print(figures_table("bytes per user, by events", LENGTH_COLUMNS, rows | {mix: _columns(figures["mix"])}))
    users = {
        f"{int(users):,}": [f"{gib:,.1f}" for gib in by_kind.values()]
        for users, by_kind in figures["redis_gib"].items()
    }
    console.print(figures_table("Redis, by users", ("fp32, GiB", "fp16, GiB"), users))


def _columns(size: Size) -> list[str]:
    numbers = [size.codewords, size.raw_bytes, size.folded_bytes, size.recent_bytes]
    for stored in _kinds(size).values():
        numbers += [stored.row_bytes, stored.redis_bytes]
    return [f"{number:,.0f}" for number in numbers]
