"""What counts are worth to a ranker: VQL without them, with those of its rows, and with exact ones, on real purchases.

The purchases of completejourney up to a date train every side alike; baskets of the weeks after it are ranked, each
from the events strictly before it. A side is trained by the training loop of `vql train`, and ranks raw histories: its
scores from rows are the same (a test). Tables are small enough to do without Spark.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console

from jobs.baskets import ExamplePlan
from jobs.bench import machine, versions
from jobs.datasets.completejourney import END, FIELDS, ITEM_COLUMNS, data_file
from jobs.evaluate import Quality, quality, score_raw
from jobs.examples import Vocabulary, timelines
from jobs.popularity import count_popularity
from jobs.sampling import Items
from jobs.study.plan import SEES
from jobs.train import DAY_MS, TrainJob, item_cells
from models.checkpoint import OTHER_ACTION
from models.count_kernels import NO_CELL
from models.counts import Counter, CountPlan
from models.files import replace_array
from models.model_names import EXACT_COUNTS
from models.request import Impression
from models.timelines import CELLS, FEATURES, impressions_of, timeline_files
from models.training import TrainPlan, train, trained_ranker
from models.wire import SECTION_BYTES

ITEM, ITEM_AND_CATEGORY = ["item_id"], ["item_id", "category"]
TWO: list[float | None] = [7 * DAY_MS, None]
ITEMS_AND_CATEGORIES = CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=TWO)
# By name: the model, and what it counts.
SIDES: dict[str, tuple[str, CountPlan | None]] = {
    "none": ("vql", None),
    "row": ("vql", ITEMS_AND_CATEGORIES),
    "exact": ("vql+counts", ITEMS_AND_CATEGORIES),
    "row_1023_cells": ("vql", CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=TWO, cells=1024)),
    "row_items": ("vql", CountPlan(fields=ITEM, half_life_ms=TWO)),
    "row_never": ("vql", CountPlan(fields=ITEM_AND_CATEGORY, half_life_ms=[None])),
    "no_history_exact": ("no_history+counts", ITEMS_AND_CATEGORIES),
    "din_50_exact": ("din_50+counts", ITEMS_AND_CATEGORIES),
}
ACTIONS = [OTHER_ACTION, "purchase"]
USERS_PER_FILE = 500


class CountsBench(msgspec.Struct, frozen=True, kw_only=True):
    """per_user, ranked_per_user: baskets of a household to train on, and to rank. length: events that VQL trains on."""

    sides: tuple[str, ...] = tuple(SIDES)
    protocols: tuple[str, ...] = ("raw", "fair")
    seeds: int = 2
    per_user: int = 8
    ranked_per_user: int = 3
    length: int = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class Purchases:
    """Every purchase as the rows that `jobs.examples.timelines` takes, and the items of those before END."""

    rows: pa.Table
    vocabulary: Vocabulary
    end_ms: int


def run_counts_bench(bench: CountsBench, work: Path, said: Console) -> dict[str, Any]:
    """Quality of each side by protocol, one for each seed. A training that was cut off in `work` goes on."""
    data = read_purchases()
    figures: dict[str, Any] = {"machine": machine(), "versions": versions(), "bench": bench, "misread": {}}
    for protocol in bench.protocols:
        until = ExamplePlan(per_user=bench.per_user, protocol=protocol, until_ms=data.end_ms)
        later = ExamplePlan(per_user=bench.ranked_per_user, protocol=protocol, from_ms=data.end_ms, seed=1)
        examples = _write(data, until, work / f"{protocol}-{bench.per_user}")
        ranked = _write(data, later, work / f"{protocol}-later-{bench.ranked_per_user}")
        impressions = [i for file in timeline_files(ranked) for i in impressions_of(file)]
        figures[protocol] = {side: [] for side in bench.sides}
        for seed in range(bench.seeds):
            for side in bench.sides:
                found = _quality(_plan(bench, data, side, examples, seed), impressions)
                figures[protocol][side].append(found)
                said.print(f"{protocol}, seed {seed}, {side}: GAUC {found.gauc:.4f}, AUC {found.auc:.4f}")
        figures["impressions"] = len(impressions)
        figures["bytes"] = {side: size_bytes(SIDES[side], data.vocabulary, impressions) for side in bench.sides}
        figures["misread"][protocol] = {
            side: misread(SIDES[side], data.vocabulary, impressions) for side in bench.sides if SIDES[side][1]
        }
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


def read_purchases() -> Purchases:
    """All purchases; an item that nobody bought before END is unknown. Raises InputError without the wheel."""
    bought = pq.read_table(data_file("transactions"), columns=["household_id", "product_id", "transaction_timestamp"])
    products = pq.read_table(data_file("products"), columns=["product_id", *(ITEM_COLUMNS[field] for field in FIELDS)])
    end_ms = int(np.datetime64(END, "ms").astype(np.int64))
    time_ms = pc.cast(pc.cast(bought["transaction_timestamp"], pa.timestamp("ms"), safe=False), pa.int64())
    known = pc.unique(pc.filter(bought["product_id"], pc.less(time_ms, end_ms)))
    known = pc.take(known, pc.sort_indices(known))
    of_product = products.take(pc.index_in(known, products["product_id"].combine_chunks()))
    fields, columns = {"item_id": [str(item) for item in known.to_pylist()]}, [np.arange(1, len(known) + 1)]
    for field in FIELDS:
        values = of_product[ITEM_COLUMNS[field]].combine_chunks()
        distinct = pc.drop_null(pc.unique(values))
        fields[field] = distinct.to_pylist()
        columns.append(pc.fill_null(pc.add(pc.index_in(values, distinct), 1), 0).to_numpy())
    count = len(bought)
    rows = {
        "user_id": pc.cast(bought["household_id"], pa.string()),
        "item": pc.fill_null(pc.add(pc.index_in(bought["product_id"], known), 1), 0),
        "action": pa.array(np.full(count, ACTIONS.index("purchase"), np.int32)),
        "time_ms": time_ms,
        "weight": pa.array(np.ones(count, np.float32)),
        "offset": pa.array(np.arange(count)),
    }
    feature_MF = np.concatenate([np.zeros((1, len(columns))), np.stack(columns, axis=1)]).astype(np.int64)
    return Purchases(rows=pa.table(rows), vocabulary=Vocabulary(fields=fields, feature_MF=feature_MF), end_ms=end_ms)


def _write(data: Purchases, plan: ExamplePlan, out: Path) -> Path:
    """The examples of a plan, as `jobs.examples.write_examples` writes them; a folder that is whole is kept."""
    if (out / FEATURES).exists():
        return out
    out.mkdir(parents=True, exist_ok=True)
    group_M = data.vocabulary.groups(plan.within)
    period = data.rows["time_ms"].to_numpy() // plan.period_ms
    once = np.ones(len(period), np.int64)
    popularity = count_popularity(period, data.rows["item"].to_numpy(), once, group_M, plan.period_ms)
    made = timelines(data.rows, Items(popularity=popularity, group_M=group_M), plan, ACTIONS)
    for part, first in enumerate(range(0, len(made), USERS_PER_FILE)):
        pq.write_table(made.slice(first, USERS_PER_FILE), out / f"part-{part:05d}.parquet")
    replace_array(out / FEATURES, data.vocabulary.feature_MF)
    return out


def _plan(bench: CountsBench, data: Purchases, side: str, examples: Path, seed: int) -> TrainPlan:
    """A training by the defaults of `vql train`, but for the window; with what it counts in its folder."""
    model, counts = SIDES[side]
    work = examples.with_name(f"{examples.name}-{side}-{bench.length}-{seed}")
    if counts is not None:
        work.mkdir(exist_ok=True)
        replace_array(work / CELLS, item_cells(model, counts, data.vocabulary))
    usual = TrainJob(log="")
    return TrainPlan(
        model=model,
        examples=str(examples),
        work=str(work),
        sizes=msgspec.structs.replace(usual.sizes, newest=0),
        half_life_ms=[list(head) for head in usual.half_life_ms],
        actions=ACTIONS,
        field_rows=[len(values) + 1 for values in data.vocabulary.fields.values()],
        counts=counts,
        length=_reads(model) or bench.length,
        seed=seed,
    )


def _quality(plan: TrainPlan, impressions: Sequence[Impression]) -> Quality:
    train(plan)
    return quality(score_raw(trained_ranker(plan), impressions, _reads(plan.model)))


def _reads(model: str) -> int | None:
    """Events that a rival looks at; None for those that train on the bench's length and rank from all events."""
    return SEES.get(model.removesuffix(EXACT_COUNTS))


def size_bytes(
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


def misread(
    side: tuple[str, CountPlan | None], vocabulary: Vocabulary, impressions: Sequence[Impression]
) -> dict[str, float]:
    """The share of candidates whose count of a field, at the longest half-life, collisions make larger."""
    model, counts = side
    assert counts is not None
    cells = (
        item_cells(each, counts, vocabulary) for each in (model, f"{model.removesuffix(EXACT_COUNTS)}{EXACT_COUNTS}")
    )
    counters = [Counter(plan=counts, cell_MQ=cell_MQ) for cell_MQ in cells]
    found, exact = (np.concatenate([each for i in impressions for each in i.counts(counter)]) for counter in counters)
    more_CQ = (found > exact * 1.001 + 1e-3).reshape(len(found), len(counts.fields), -1)[..., -1]
    return dict(zip(counts.fields, more_CQ.mean(axis=0).round(5).tolist(), strict=True))
