"""What counts are worth to a ranker: VQL without them, with those of its rows, and with exact ones, on real purchases.

The log of completejourney up to a date trains every side alike; the baskets of the weeks after it are ranked, each from
the events strictly before it. A side is trained by the command's own training, and ranks raw histories: its scores from
rows are the same (a test).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from rich.console import Console

from jobs.baskets import ExamplePlan
from jobs.bench import machine, versions
from jobs.datasets.completejourney import END, FIELDS, ITEM_COLUMNS, data_file, purchases
from jobs.evaluate import Quality, quality, score_raw
from jobs.event_log import read_events
from jobs.examples import Vocabulary, build_vocabulary, write_examples
from jobs.ingest import ingest, ingest_items
from jobs.spark import open_spark, read_delta
from jobs.train import DAY_MS, TrainJob, item_cells, run_training
from models.checkpoint import OTHER_ACTION, Checkpoint
from models.count_kernels import NO_CELL
from models.counts import CountPlan
from models.load import load_ranker
from models.request import Impression
from models.timelines import impressions_of, timeline_files
from models.wire import SECTION_BYTES

ITEM, ITEM_AND_CATEGORY = ["item_id"], ["item_id", "category"]
TWO: list[float | None] = [7 * DAY_MS, None]
NEVER: list[float | None] = [None]
# By name: the model, and what it counts.
SIDES: dict[str, tuple[str, CountPlan | None]] = {
    "none": ("vql", None),
    "row": ("vql", CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=TWO)),
    "exact": ("vql+counts", CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=TWO)),
    "row_1023_cells": ("vql", CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=TWO, cells=1024)),
    "row_items": ("vql", CountPlan(fields=ITEM, half_life_ms=TWO)),
    "row_never": ("vql", CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=NEVER)),
    "no_history_exact": ("no_history+counts", CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=TWO)),
    "din_50_exact": ("din_50+counts", CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=TWO)),
}


class CountsBench(msgspec.Struct, frozen=True, kw_only=True):
    """per_user: impressions of a household to train on, and to rank. length: events that VQL is trained on."""

    sides: tuple[str, ...] = tuple(SIDES)
    protocols: tuple[str, ...] = ("raw", "fair")
    seeds: int = 2
    per_user: int = 8
    length: int = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class _Data:
    """The log to train on, what comes after it, the items of the first, and where things are written."""

    spark: SparkSession
    log: Path
    later: Path
    vocabulary: Vocabulary
    work: Path


def run_counts_bench(bench: CountsBench, work: Path, said: Console) -> dict[str, Any]:
    """Quality of each side by protocol, one for each seed. What was trained in `work` before is not trained again."""
    data = _prepare(work)
    figures: dict[str, Any] = {"machine": machine(), "versions": versions(), "bench": bench, "bytes": {}}
    for protocol in bench.protocols:
        impressions = _impressions(bench, data, protocol)
        figures[protocol] = {side: [] for side in bench.sides}
        for seed in range(bench.seeds):
            for side in bench.sides:
                found = _quality(_train(bench, data, side, protocol, seed), data.vocabulary, impressions)
                figures[protocol][side].append(found)
                said.print(f"{protocol}, seed {seed}, {side}: GAUC {found.gauc:.4f}, AUC {found.auc:.4f}")
        figures["impressions"] = len(impressions)
        figures["bytes"] = {side: _size_bytes(SIDES[side], data.vocabulary, impressions) for side in bench.sides}
    data.spark.stop()
    return figures


def table_columns(bench: CountsBench) -> list[str]:
    return [f"{protocol} {what}" for protocol in bench.protocols for what in ("GAUC", "range", "AUC")] + ["bytes"]


def table_rows(bench: CountsBench, figures: Mapping[str, Any]) -> dict[str, list[str]]:
    """For each side by protocol the mean over seeds of GAUC, its range, and AUC; and the bytes of a mean user."""
    rows = {}
    for side in bench.sides:
        row = []
        for protocol in bench.protocols:
            gauc, auc = ([getattr(each, name) for each in figures[protocol][side]] for name in ("gauc", "auc"))
            row += [f"{np.mean(gauc):.4f}", f"{np.ptp(gauc):.4f}", f"{np.mean(auc):.4f}"]
        rows[side] = [*row, f"{figures['bytes'][side]['mean']:,.0f}"]
    return rows


def _prepare(work: Path) -> _Data:
    spark, log, later = open_spark(name="vql-bench-counts"), work / "log", work / "later"
    ingest(spark, purchases(f"transaction_timestamp < '{END}'"), log)
    ingest(spark, purchases(f"transaction_timestamp >= '{END}'"), later)
    ingest_items(spark, data_file("products"), "parquet", ITEM_COLUMNS, log)
    vocabulary = build_vocabulary(read_events(spark, log, None), read_delta(spark, log / "items"), list(FIELDS))
    return _Data(spark=spark, log=log, later=later, vocabulary=vocabulary, work=work)


def _train(bench: CountsBench, data: _Data, side: str, protocol: str, seed: int) -> Checkpoint:
    model, counts = SIDES[side]
    job = TrainJob(
        log=str(data.log),
        fields=FIELDS,
        model=model,
        counts=counts,
        examples=ExamplePlan(per_user=bench.per_user, protocol=protocol),
        length=bench.length,
        seed=seed,
    )
    return run_training(data.spark, job, data.work / "train", data.work / "checkpoints" / f"{protocol}-{side}-{seed}")


def _impressions(bench: CountsBench, data: _Data, protocol: str) -> list[Impression]:
    """Baskets after the log that was trained on, and all before them."""
    events = read_delta(data.spark, data.log / "events")
    from_ms = events.agg(F.max("event_time_ms")).collect()[0][0] + 1
    plan = ExamplePlan(from_ms=from_ms, per_user=bench.per_user, seed=1, protocol=protocol)
    both = events.unionByName(read_delta(data.spark, data.later / "events"))
    out = data.work / f"later-{protocol}-{bench.per_user}"
    write_examples(data.spark, both, data.vocabulary, [OTHER_ACTION, "purchase"], plan, out)
    return [i for file in timeline_files(out) for i in impressions_of(file)]


def _quality(checkpoint: Checkpoint, vocabulary: Vocabulary, impressions: Sequence[Impression]) -> Quality:
    manifest = checkpoint.manifest
    cells = None if manifest.counts is None else item_cells(manifest.model, manifest.counts, vocabulary)
    length = 50 if manifest.model.startswith("din_50") else 1 if manifest.model.startswith("no_history") else None
    return quality(score_raw(load_ranker(checkpoint, vocabulary.feature_MF, cells), impressions, length))


def _size_bytes(
    side: tuple[str, CountPlan | None], vocabulary: Vocabulary, impressions: Sequence[Impression]
) -> dict[str, float]:
    """What counts take in the rows of the users of these impressions; as if exact ones were kept so."""
    model, counts = side
    if counts is None:
        return {"mean": 0.0, "p99": 0.0}
    cell_MQ = item_cells(model, counts, vocabulary)
    newest = {impression.user_id: impression for impression in impressions}
    cells_U = [len(np.setdiff1d(cell_MQ[impression.item_L], NO_CELL)) for impression in newest.values()]
    size_U = 3 * SECTION_BYTES + np.array(cells_U) * (2 + 4 + 4 * len(counts.half_life_ms))
    return {"mean": round(float(size_U.mean()), 1), "p99": round(float(np.quantile(size_U, 0.99)), 1)}
