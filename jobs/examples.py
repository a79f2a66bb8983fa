"""Point-in-time examples from the log: what had happened before each impression, and what was asked in it.

Users' events up to a log version become timelines (models.timelines) with impressions on them (jobs.protocols).
"Before" is by event time: an event that arrived late counts as known when it happened. An event that was retracted
counts as never having happened. Draws depend on (seed, user, basket) alone, and files on the user: the same log and
seed give the same examples in the same order on any cluster.
"""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark import Broadcast
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.baskets import Events, ExamplePlan
from jobs.popularity import Popularity, count_popularity
from jobs.protocols import check_plan, draw, remember
from jobs.sampling import Items
from models.errors import InputError
from models.files import locked, replace_array
from models.item_context import Context, ContextFields, context_of, fit_context, tag_index, told
from models.timelines import FEATURES, SCHEMA, VECTORS

UNKNOWN_VALUE = ""
# A trainer holds one file in memory.
USERS_PER_FILE = 5_000

_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Vocabulary:
    """The items a model knows: values of each field in embedding order, and the feature rows (M x F, row 0 unknown).

    context: the features beside the fields, if there are any, with the tags in embedding order and the vectors (M x P).
    """

    fields: dict[str, list[str]]
    feature_MF: np.ndarray
    context: Context | None = None
    tags: dict[str, list[str]] = field(default_factory=dict)
    vector_MP: np.ndarray | None = None

    def groups(self, field: str | None) -> np.ndarray:
        """The group of each item: its value of the field, or one group of all. Raises InputError for no such field."""
        if field is None:
            return np.zeros(len(self.feature_MF), np.int64)
        if field not in self.fields:
            raise InputError(f"negatives within {field!r}: no such item field is used, only {list(self.fields)}")
        return self.feature_MF[:, list(self.fields).index(field)]


def build_vocabulary(
    events: DataFrame, static: DataFrame | None, fields: list[str], declared: ContextFields = ContextFields()
) -> Vocabulary:
    """Every item of the events, with the declared features of the items table (None: none) where it has them.

    The items come to the driver: the embedding lives there too. Raises InputError for an undeclared feature, and as
    `fit_context`.
    """
    table = _items(events, static, fields, declared.names)
    if table.num_rows == 0:
        raise InputError("the log holds no events before the cut; ingest some first")
    values = {name: sorted(set(_cells(table, name)) - {UNKNOWN_VALUE}) for name in fields}
    values = {"item_id": table["item_id"].to_pylist(), **values}
    context, tags = fit_context(table, declared) if declared.names else (None, {})
    return _described(table, values, context, tags)


def _items(events: DataFrame, static: DataFrame | None, fields: list[str], context: Sequence[str]) -> pa.Table:
    """The items of the events by id, fields as text."""
    items = events.select("item_id").distinct()
    if static is not None:
        if missing := [f for f in (*fields, *context) if f not in static.columns]:
            raise InputError(
                f"the log's items have no columns {missing}; they have {static.columns}: vql ingest-items --column "
                "declares them"
            )
        static = static.select("item_id", *(F.col(f).cast("string").alias(f) for f in fields), *context)
        items = items.join(static, "item_id", "left")
    return items.orderBy("item_id").toArrow()


def _cells(table: pa.Table, name: str) -> list[str]:
    return [UNKNOWN_VALUE if v is None else v for v in table[name].to_pylist()]


def _described(
    table: pa.Table, fields: dict[str, list[str]], context: Context | None, tags: dict[str, list[str]]
) -> Vocabulary:
    """The items of a table by these values of fields, context and tags; row 0 is the unknown one."""
    columns = []
    for name, values in fields.items():
        index = {v: i + 1 for i, v in enumerate(values)}
        columns.append(np.array([index.get(cell, 0) for cell in _cells(table, name)], np.int64)[:, None])
    vector_MP = None
    if context is not None:
        of = context_of(table, context, tag_index(tags))
        columns.append(of.row_NC)
        if context.vectors:
            vector_MP = np.concatenate([np.full((1, context.vector_width), np.nan, np.float32), of.vector_NP])
        if any(of.left_out.values()):
            _log.warning("left out of the items' features: %s", told(context, of.left_out))
    feature_NF = np.concatenate(columns, axis=1)
    feature_MF = np.concatenate([np.zeros((1, feature_NF.shape[1]), np.int64), feature_NF])
    return Vocabulary(fields=fields, feature_MF=feature_MF, context=context, tags=tags, vector_MP=vector_MP)


def extended(vocabulary: Vocabulary, events: DataFrame, static: DataFrame | None) -> Vocabulary:
    """With the items of these events that it lacks: they have its rows of fields, and the row of unknown ids.

    So a model of the vocabulary can be asked about items that came after its training.
    """
    context, names = vocabulary.context, list(vocabulary.fields)[1:]
    table = _items(events, static, names, () if context is None else context.names)
    now = _described(table, vocabulary.fields, context, vocabulary.tags)
    # The unknown item is not new.
    new_N = np.r_[False, now.feature_MF[1:, 0] == 0]
    vector_MP = vocabulary.vector_MP
    if vector_MP is not None and now.vector_MP is not None:
        vector_MP = np.concatenate([vector_MP, now.vector_MP[new_N]])
    item_ids = vocabulary.fields["item_id"] + table["item_id"].filter(pa.array(new_N[1:])).to_pylist()
    return replace(
        vocabulary,
        fields={**vocabulary.fields, "item_id": item_ids},
        feature_MF=np.concatenate([vocabulary.feature_MF, now.feature_MF[new_N]]),
        vector_MP=vector_MP,
    )


def grown(known: Vocabulary, events: DataFrame, static: DataFrame | None) -> Vocabulary:
    """Its values in their places and behind them those that the items of these events have more; tags stay as they are.

    So that parameters made for it still belong to the same values. Its own items are there too, events or none, as
    the items table describes them now.
    """
    names = list(known.fields)[1:]
    item_ids = events.sparkSession.createDataFrame(pa.table({"item_id": known.fields["item_id"]}))
    declared = () if known.context is None else known.context.names
    table = _items(events.select("item_id").unionByName(item_ids), static, names, declared)
    values = {
        name: [*old, *sorted(set(_cells(table, name)) - {UNKNOWN_VALUE, *old})] for name, old in known.fields.items()
    }
    place = {item_id: i for i, item_id in enumerate(values["item_id"])}
    order = np.argsort([place[item_id] for item_id in table["item_id"].to_pylist()])
    return _described(table.take(order), values, known.context, known.tags)


def write_examples(
    spark: SparkSession, events: DataFrame, vocabulary: Vocabulary, actions: list[str], plan: ExamplePlan, out: Path
) -> None:
    """Timelines of all users to `out` (Parquet and features.npy), whole or absent; an existing folder is kept."""
    check_plan(plan)
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
    group_M = vocabulary.groups(plan.within)
    known = spark.sparkContext.broadcast(Items(popularity=_popularity(indexed, group_M, plan), group_M=group_M))
    grouped = indexed.groupBy("user_id").applyInArrow(_builder(plan, known, actions), from_arrow_schema(SCHEMA))
    placed = grouped.repartition(plan.files, "user_id").sortWithinPartitions("user_id")
    placed.write.option("maxRecordsPerFile", USERS_PER_FILE).parquet(str(out))
    if vocabulary.vector_MP is not None:
        replace_array(out / VECTORS, vocabulary.vector_MP)
    # Written last: its presence says that the folder is whole.
    replace_array(out / FEATURES, vocabulary.feature_MF)


def _index_of(actions: list[str]) -> F.Column:
    pairs = [F.lit(x) for i, action in enumerate(actions) for x in (action, i)]
    return F.create_map(*pairs)[F.col("action")]


def _popularity(indexed: DataFrame, group_M: np.ndarray, plan: ExamplePlan) -> Popularity:
    """The counts come to the driver: they grow with items and periods, not with users."""
    known = indexed.where("item > 0").withColumn("period", F.expr(f"time_ms div {plan.period_ms}"))
    counts = known.groupBy("period", "item").count().toArrow()
    period, item, count = (counts[c].to_numpy() for c in ("period", "item", "count"))
    return count_popularity(period, item, count, group_M, plan.period_ms)


def _builder(plan: ExamplePlan, known: Broadcast[Items], actions: list[str]) -> Callable[[pa.Table], pa.Table]:
    def build(user: pa.Table) -> pa.Table:
        return timelines(user, known.value, plan, actions)

    return build


def timelines(rows: pa.Table, items: Items, plan: ExamplePlan, actions: list[str]) -> pa.Table:
    """Users' events (user_id, item, action, time_ms, weight, offset) to a row for each user that has impressions."""
    events = sorted_events(rows)
    events, drawn = remember(events, draw(events, items, plan, actions), plan, actions)
    users, first_K = np.unique(drawn.user_I, return_index=True)
    bound_K = np.r_[first_K, len(drawn.user_I)]
    kept_N = np.isin(events.user_N, users)
    size_K = np.bincount(events.user_N, minlength=len(events.user_ids))[users]
    start_I = np.searchsorted(events.user_N, drawn.user_I)
    of_event = {
        "item": events.item_N,
        "action": events.action_N,
        "time_ms": events.time_ms_N,
        "weight": events.weight_N,
    }
    of_impression = {
        "now_ms": drawn.now_ms_I,
        "end": drawn.history_I - start_I,
        "candidate": _lists(drawn.bound_I, drawn.candidate_C),
        "label": _lists(drawn.bound_I, drawn.label_C),
    }
    columns = {"user_id": pa.array([events.user_ids[user] for user in users], pa.string())}
    columns |= {name: _lists(np.r_[0, np.cumsum(size_K)], values[kept_N]) for name, values in of_event.items()}
    columns |= {name: _lists(bound_K, values) for name, values in of_impression.items()}
    return pa.table(columns).cast(SCHEMA)


def _lists(bound: np.ndarray, values: np.ndarray | pa.Array) -> pa.ListArray:
    return pa.ListArray.from_arrays(pa.array(bound, pa.int32()), values)


def sorted_events(rows: pa.Table) -> Events:
    """Events by user, then time, then offset, without what was retracted."""
    rows = rows.sort_by([("user_id", "ascending"), ("time_ms", "ascending"), ("offset", "ascending")])
    rows = without_retracted(rows)
    user = rows["user_id"].combine_chunks().dictionary_encode()
    return Events(
        user_ids=user.dictionary.to_pylist(),
        user_N=user.indices.to_numpy().astype(np.int64),
        item_N=rows["item"].to_numpy(),
        action_N=rows["action"].to_numpy(),
        time_ms_N=rows["time_ms"].to_numpy(),
        weight_N=rows["weight"].to_numpy(),
    )


def without_retracted(rows: pa.Table) -> pa.Table:
    """The events less retractions, and less the event that each of them takes back."""
    weight = rows["weight"].to_numpy()
    if (weight > 0).all():
        return rows
    facts = list(
        zip(
            *(rows[c].to_pylist() for c in ("user_id", "item", "action", "time_ms")),
            np.abs(weight).tolist(),
            strict=True,
        )
    )
    taken_back = Counter(fact for fact, w in zip(facts, weight, strict=True) if w < 0)
    kept = []
    for fact, w in zip(facts, weight, strict=True):
        gone = w < 0 or taken_back[fact] > 0
        if w > 0 and gone:
            taken_back[fact] -= 1
        kept.append(not gone)
    return rows.filter(pa.array(kept))
