"""What an impression costs to train by the length of its history: VQL over timelines, and exact attention over each.

Users are random, of one length. As many impressions whatever the length, over its newest tenth ("vql", "full"); or one
for so many events, over all of it ("steady": who has been here ten times as long was asked ten times as often). Steps
are those of `vql train`, with forward, backward, optimisers and codebook. Each length has a process of its own, whose
peak of memory is its own.
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from matplotlib.figure import Figure
from rich.console import Console

from jobs.bench import machine, versions
from jobs.devices import usable_device
from jobs.plots import new_figure
from models.checkpoint import OTHER_ACTION, Sizes
from models.timelines import FEATURES, SCHEMA, Limits, batches, timeline_batches, timeline_files
from models.training import TrainPlan, begin, start_codebook, step

SIDES = ("vql", "steady", "full")
# Steps of each side and length; the first is not counted.
STEPS = 6
HOUR_MS = 3_600_000
START_MS = 1_600_000_000_000


class TrainBench(msgspec.Struct, frozen=True, kw_only=True):
    """lengths: events of a user. impressions: of a user; `steady`: of 1,000 events of a user.

    full_batch: impressions of a step of exact attention, whose memory grows with both. device: as `vql train` has it,
    with products in bfloat16 where it is no CPU.
    """

    lengths: tuple[int, ...] = (1_000, 3_000, 10_000, 20_000)
    users: int = 20
    impressions: int = 16
    candidates: int = 20
    items: int = 50_000
    batch: int = 64
    full_batch: int = 4
    threads: int = 1
    device: str = "cpu"
    sizes: Sizes = Sizes()


class Cost(msgspec.Struct, frozen=True, kw_only=True):
    """ms_per_impression: of steps after the first, in the median. peak_mb: of the process, with Python and torch.

    device_peak_mb: of tensors on a device that is no CPU.
    """

    ms_per_impression: float
    peak_mb: float
    steps: int
    device_peak_mb: float | None = None


def run_train_bench(bench: TrainBench, said: Console) -> dict[str, Any]:
    """The cost of every length, of each side."""
    figures: dict[str, Any] = {"machine": machine(), "versions": versions(), "bench": bench}
    if usable_device(bench.device).type == "cuda":
        figures["device"] = torch.cuda.get_device_name(bench.device)
    spawn = multiprocessing.get_context("spawn")
    for side in SIDES:
        figures[side] = {}
        for length in bench.lengths:
            with spawn.Pool(1) as alone:
                cost = alone.apply(measure, (bench, side, length))
            on_device = "" if cost.device_peak_mb is None else f", {cost.device_peak_mb:,.0f} MB on the device"
            costs = f"{cost.ms_per_impression:.2f} ms, {cost.peak_mb:,.0f} MB{on_device}"
            said.print(f"{side}, {length:,} events: {costs}")
            figures[side][str(length)] = cost
        first, *_, last = (figures[side][str(length)].ms_per_impression for length in bench.lengths)
        figures[f"{side}_growth"] = round(last / first, 2)
    return figures


def table_rows(bench: TrainBench, figures: Mapping[str, Any]) -> dict[str, list[str]]:
    rows = {}
    for side in SIDES:
        costs = [figures[side][str(length)] for length in bench.lengths]
        rows[f"{side}, ms per impression"] = [f"{cost.ms_per_impression:.2f}" for cost in costs]
        rows[f"{side}, peak MB"] = [f"{cost.peak_mb:,.0f}" for cost in costs]
        if costs[0].device_peak_mb is not None:
            rows[f"{side}, peak MB on the device"] = [f"{cost.device_peak_mb:,.0f}" for cost in costs]
    return rows


def curve(bench: TrainBench, figures: Mapping[str, Any]) -> Figure:
    """The milliseconds of every side by length, both in logarithms."""
    figure, axes = new_figure()
    for side in SIDES:
        costs = [figures[side][str(length)].ms_per_impression for length in bench.lengths]
        axes.plot(bench.lengths, costs, marker="o", label=side)
    axes.set(xscale="log", yscale="log", xlabel="events of the user", ylabel="ms per impression")
    axes.legend()
    return figure


def measure(bench: TrainBench, side: str, length: int) -> Cost:
    """Steps over random users of this length. For a process of its own."""
    torch.set_num_threads(bench.threads)
    on_gpu = torch.device(bench.device).type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        plan = _plan(bench, side, Path(folder))
        rng = np.random.default_rng(0)
        _write_users(bench, length, _ends(bench, side, length, rng), Path(plan.examples))
        run, files = begin(plan), timeline_files(Path(plan.examples))
        if side != "full":
            start_codebook(run)
            limits = Limits(impressions=plan.batch, events=plan.events)
            shares = list(islice(timeline_batches(files, limits, seed=0, epoch=0), STEPS))
        else:
            plan = msgspec.structs.replace(plan, length=length)
            run.plan = plan
            shares = list(islice(batches(files, plan.batch, seed=0, epoch=0), STEPS))
        run.steps = len(shares)
        costs_ms = []
        for share in shares:
            run.step += 1
            started_s = time.perf_counter()
            step(run, share)
            if on_gpu:
                torch.cuda.synchronize()
            asked = len(share) if side == "full" else sum(len(one.end_I) for one in share)
            costs_ms.append((time.perf_counter() - started_s) * 1e3 / asked)
    # Linux counts kilobytes, macOS bytes.
    unit = 2**20 if sys.platform == "darwin" else 2**10
    return Cost(
        ms_per_impression=round(statistics.median(costs_ms[1:] or costs_ms), 3),
        peak_mb=round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit, 1),
        steps=len(costs_ms),
        device_peak_mb=round(torch.cuda.max_memory_allocated() / 2**20, 1) if on_gpu else None,
    )


def _plan(bench: TrainBench, side: str, folder: Path) -> TrainPlan:
    return TrainPlan(
        model="full" if side == "full" else "vql",
        examples=str(folder / "examples"),
        work=str(folder / "work"),
        sizes=bench.sizes,
        half_life_ms=[[24.0 * HOUR_MS * 7**h] for h in range(bench.sizes.heads)],
        actions=[OTHER_ACTION, "view"],
        field_rows=[bench.items + 1, 101],
        batch=bench.full_batch if side == "full" else bench.batch,
        device=bench.device,
        bfloat16=bench.device != "cpu",
    )


def _ends(bench: TrainBench, side: str, length: int, rng: np.random.Generator) -> np.ndarray:
    """The events that each impression of a user sees (users x impressions)."""
    steady = side == "steady"
    impressions = max(1, bench.impressions * length // 1_000) if steady else bench.impressions
    oldest = 1 if steady else length - max(1, length // 10)
    return np.sort(rng.integers(oldest, length + 1, (bench.users, impressions)))


def _write_users(bench: TrainBench, length: int, ends: np.ndarray, folder: Path) -> None:
    rng = np.random.default_rng(1)
    folder.mkdir()
    rows = []
    for user, end in enumerate(ends):
        rows.append(
            {
                "user_id": f"u{user}",
                # As with the items of a shop, few are met often.
                "item": 1 + (bench.items * rng.random(length) ** 3).astype(int),
                "action": rng.integers(0, 2, length),
                "time_ms": START_MS + np.arange(length) * HOUR_MS,
                "weight": np.ones(length),
                "now_ms": START_MS + end * HOUR_MS,
                "end": end,
                "candidate": list(rng.integers(1, bench.items + 1, (len(end), bench.candidates))),
                "label": list((np.arange(bench.candidates) < 4) * np.ones((len(end), 1))),
            }
        )
    table = pa.table({name: [row[name] for row in rows] for name in SCHEMA.names}).cast(SCHEMA)
    pq.write_table(table, folder / "part-00000.parquet")
    item = np.arange(bench.items + 1)
    np.save(folder / FEATURES, np.stack([item, np.where(item > 0, item % 100 + 1, 0)], axis=1))
