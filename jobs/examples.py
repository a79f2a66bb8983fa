"""Point-in-time examples from the log: what had happened before each basket, and what was bought in it.

Users' events up to a log version become timelines (models.timelines). An impression is a basket (a user's events
of one event time): the positives are some of its items, the negatives are drawn by the items' popularity in the
period of the basket, and the history is the events strictly before it, so nothing of the basket is seen.
"Before" is by event time: an event that arrived late counts as known when it happened. An event that was retracted
counts as never having happened. Draws depend on (seed, user, basket) alone, and files on the user: the same log and
seed give the same examples in the same order on any cluster.
"""

from __future__ import annotations

import io
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from models.errors import InputError
from models.files import locked, replace_file
from models.timelines import FEATURES, SCHEMA

UNKNOWN_VALUE = ""
# A trainer holds one file in memory.
USERS_PER_FILE = 5_000


class ExamplePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the examples. Impressions lie in [from_ms, until_ms); a user has at most per_user of them."""

    from_ms: int = 0
    until_ms: int = 2**62
    per_user: int = 16
    positives: int = 4
    negatives: int = 16
    period_ms: int = 28 * 86_400_000
    files: int = 8
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The items a model knows: values of each field in embedding order, and the feature rows (M x F, row 0 unknown)."""

    fields: dict[str, list[str]]
    feature_MF: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Popularity:
    """Cumulative item counts by period, for drawing negatives; a period without events falls back to all."""

    item_by_period: dict[int, np.ndarray]
    cumulative_by_period: dict[int, np.ndarray]
    period_ms: int

    def draw(self, rng: np.random.Generator, now_ms: int, count: int, exclude: np.ndarray) -> np.ndarray:
        """`count` items by popularity, none of `exclude`; fewer when the period has no others."""
        period = now_ms // self.period_ms
        period = period if period in self.item_by_period else -1
        items, cumulative = self.item_by_period[period], self.cumulative_by_period[period]
        drawn = items[np.searchsorted(cumulative, rng.random(3 * count + 8) * cumulative[-1], side="right")]
        return drawn[~np.isin(drawn, exclude)][:count]


def build_vocabulary(events: DataFrame, static: DataFrame | None, fields: list[str]) -> Vocabulary:
    """Every item of the events, with the declared fields of the items table (None: no fields) where it has them.

    The items come to the driver: the embedding lives there too. Raises InputError for an undeclared field.
    """
    items = events.select("item_id").distinct()
    if static is not None:
        missing = [f for f in fields if f not in static.columns]
        if missing:
            raise InputError(f"the log's items have no columns {missing}; they have {static.columns}")
        items = items.join(static.select("item_id", *fields), "item_id", "left")
    table = items.orderBy("item_id").toArrow()
    if table.num_rows == 0:
        raise InputError("the log holds no events before the cut; ingest some first")
    values: dict[str, list[str]] = {"item_id": table["item_id"].to_pylist()}
    columns = [np.arange(1, table.num_rows + 1)]
    for field in fields:
        cells = [UNKNOWN_VALUE if v is None else str(v) for v in table[field].to_pylist()]
        values[field] = sorted(set(cells) - {UNKNOWN_VALUE})
        index = {v: i + 1 for i, v in enumerate(values[field])}
        columns.append(np.array([index.get(c, 0) for c in cells]))
    feature_MF = np.concatenate([np.zeros((1, len(columns))), np.stack(columns, axis=1)]).astype(np.int64)
    return Vocabulary(fields=values, feature_MF=feature_MF)


def write_examples(
    spark: SparkSession, events: DataFrame, vocabulary: Vocabulary, actions: list[str], plan: ExamplePlan, out: Path
) -> None:
    """Timelines of all users to `out` (Parquet and features.npy), whole or absent; an existing folder is kept."""
    with locked(out.with_name(f"{out.name}.lock")):
        if not (out / FEATURES).exists():
            _write_examples(spark, events, vocabulary, actions, plan, out)


def _write_examples(
    spark: SparkSession, events: DataFrame, vocabulary: Vocabulary, actions: list[str], plan: ExamplePlan, out: Path
) -> None:
    shutil.rmtree(out, ignore_errors=True)
    items = pa.table({"item_id": vocabulary.fields["item_id"], "item": np.arange(1, len(vocabulary.feature_MF))})
    indexed = events.join(F.broadcast(spark.createDataFrame(items)), "item_id", "left").select(
        "user_id",
        F.coalesce("item", F.lit(0)).cast("int").alias("item"),
        F.coalesce(_index_of(actions), F.lit(0)).cast("int").alias("action"),
        F.col("event_time_ms").alias("time_ms"),
        F.col("weight").cast("float").alias("weight"),
        "offset",
    )
    popularity = spark.sparkContext.broadcast(_popularity(indexed, plan))
    grouped = indexed.groupBy("user_id").applyInArrow(_timeline_builder(plan, popularity), from_arrow_schema(SCHEMA))
    placed = grouped.repartition(plan.files, "user_id").sortWithinPartitions("user_id")
    placed.write.option("maxRecordsPerFile", USERS_PER_FILE).parquet(str(out))
    # Written last: its presence says that the folder is whole.
    buffer = io.BytesIO()
    np.save(buffer, vocabulary.feature_MF)
    replace_file(out / FEATURES, buffer.getvalue())


def _index_of(actions: list[str]) -> F.Column:
    pairs = [F.lit(x) for i, action in enumerate(actions) for x in (action, i)]
    return F.create_map(*pairs)[F.col("action")]


def _popularity(indexed: DataFrame, plan: ExamplePlan) -> Popularity:
    """Item counts by period and over all (period -1); grows with items, not users."""
    known = indexed.where("item > 0").withColumn("period", F.expr(f"time_ms div {plan.period_ms}"))
    counts = known.groupBy("period", "item").count().orderBy("period", "item").toArrow()
    period, item, count = (counts[c].to_numpy() for c in ("period", "item", "count"))
    everything = np.bincount(item, weights=count) if len(item) else np.ones(1)
    by_item = {-1: np.flatnonzero(everything)}
    by_count = {-1: np.cumsum(everything[by_item[-1]])}
    for p in np.unique(period):
        by_item[int(p)], by_count[int(p)] = item[period == p], np.cumsum(count[period == p])
    return Popularity(item_by_period=by_item, cumulative_by_period=by_count, period_ms=plan.period_ms)


def _timeline_builder(plan: ExamplePlan, popularity) -> Callable[[pa.Table], pa.Table]:
    def build(user: pa.Table) -> pa.Table:
        return timeline(user, plan, popularity.value)

    return build


def timeline(user: pa.Table, plan: ExamplePlan, popularity: Popularity) -> pa.Table:
    """One user's events to one timeline row; a user without impressions gives no row."""
    user = without_retracted(user.sort_by([("time_ms", "ascending"), ("offset", "ascending")]))
    if user.num_rows == 0:
        return SCHEMA.empty_table()
    user_id = user["user_id"][0].as_py()
    time_ms, item = user["time_ms"].to_numpy(), user["item"].to_numpy()
    # Unknown items make no positives.
    wanted = item > 0
    starts = np.flatnonzero(np.r_[True, np.diff(time_ms) > 0])
    ends = np.r_[starts[1:], len(time_ms)]
    rows: dict[str, list] = {"now_ms": [], "end": [], "candidate": [], "label": []}
    for b in _chosen(user_id, time_ms[starts], plan):
        basket = slice(starts[b], ends[b])
        bought = np.unique(item[basket][wanted[basket]])
        rng = np.random.default_rng([plan.seed, crc32(user_id.encode()), int(time_ms[starts[b]])])
        positive = rng.permutation(bought)[: plan.positives]
        negative = popularity.draw(rng, int(time_ms[starts[b]]), plan.negatives, np.r_[bought, 0])
        if starts[b] == 0 or len(positive) == 0 or len(negative) == 0:
            continue
        rows["now_ms"].append(int(time_ms[starts[b]]))
        rows["end"].append(int(starts[b]))
        rows["candidate"].append(np.r_[positive, negative].tolist())
        rows["label"].append([1] * len(positive) + [0] * len(negative))
    if not rows["end"]:
        return SCHEMA.empty_table()
    columns = {name: [user[name].to_pylist()] for name in ("item", "action", "time_ms", "weight")}
    columns |= {name: [cells] for name, cells in rows.items()}
    return pa.table({"user_id": [user_id], **columns}, schema=SCHEMA)


def without_retracted(user: pa.Table) -> pa.Table:
    """The events less retractions, and less the event that each of them takes back."""
    weight = user["weight"].to_numpy()
    if (weight > 0).all():
        return user
    facts = list(
        zip(*(user[c].to_pylist() for c in ("item", "action", "time_ms")), np.abs(weight).tolist(), strict=True)
    )
    taken_back = Counter(fact for fact, w in zip(facts, weight, strict=True) if w < 0)
    kept = []
    for fact, w in zip(facts, weight, strict=True):
        gone = w < 0 or taken_back[fact] > 0
        if w > 0 and gone:
            taken_back[fact] -= 1
        kept.append(not gone)
    return user.filter(pa.array(kept))


def _chosen(user_id: str, basket_ms: np.ndarray, plan: ExamplePlan) -> list[int]:
    """Which baskets become impressions: a seeded draw."""
    inside = np.flatnonzero((basket_ms >= plan.from_ms) & (basket_ms < plan.until_ms))
    rng = np.random.default_rng([plan.seed, crc32(user_id.encode())])
    return sorted(rng.permutation(inside)[: plan.per_user].tolist())
