"""Real purchases as training examples, without Spark: some households of completejourney, whose wheel is installed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs.baskets import ExamplePlan
from jobs.datasets.completejourney import ITEM_COLUMNS, data_file
from jobs.examples import UNKNOWN_VALUE, Vocabulary, timelines
from jobs.popularity import count_popularity
from jobs.sampling import Items
from models.checkpoint import OTHER_ACTION
from models.item_context import ContextFields, context_of, fit_context, tag_index
from models.timelines import FEATURES, VECTORS

ACTIONS = [OTHER_ACTION, "purchase", "sale"]
# What `item_context` says of each product.
CONTEXT = ContextFields(numbers=("quantity",), tags=("words",), vectors=("months",))
MOST_WEIGHT = 4


def bought(households: int, least: int, most: int) -> pa.Table:
    """Every purchase of the first households with so many: what was bought at a discount is a sale.

    Columns household_id, product_id, time_ms, action, weight (the quantity, from 1 to MOST_WEIGHT), oldest first.
    """
    columns = ["household_id", "product_id", "transaction_timestamp", "quantity", "retail_disc"]
    table = pq.read_table(data_file("transactions"), columns=columns)
    counts = table.group_by("household_id").aggregate([("product_id", "count")]).sort_by("household_id")
    fit = counts.filter(pc.is_in(counts["product_id_count"], pa.array(range(least, most + 1))))
    table = table.filter(pc.is_in(table["household_id"], fit["household_id"][:households].combine_chunks()))
    table = table.sort_by("transaction_timestamp")
    quantity = pc.min_element_wise(pc.max_element_wise(table["quantity"], 1), MOST_WEIGHT)
    return pa.table(
        {
            "household_id": table["household_id"],
            "product_id": table["product_id"],
            "time_ms": pc.cast(pc.cast(table["transaction_timestamp"], pa.timestamp("ms"), safe=False), pa.int64()),
            "action": pc.if_else(pc.greater(table["retail_disc"], 0), 2, 1).cast(pa.int32()),
            "weight": pc.cast(quantity, pa.float32()),
        }
    )


def vocabulary_of(purchases: pa.Table, fields: Sequence[str]) -> Vocabulary:
    """The items of these purchases with these fields of the data set, as `jobs.examples.build_vocabulary` has them."""
    known = pc.unique(purchases["product_id"]).sort()
    products = pq.read_table(data_file("products"), columns=["product_id", *(ITEM_COLUMNS[field] for field in fields)])
    of_item = products.take(pc.index_in(known, products["product_id"].combine_chunks()))
    values: dict[str, list[str]] = {"item_id": [str(item) for item in known.to_pylist()]}
    columns = [np.arange(1, len(known) + 1)]
    for field in fields:
        cells = [value or UNKNOWN_VALUE for value in of_item[ITEM_COLUMNS[field]].to_pylist()]
        values[field] = sorted(set(cells) - {UNKNOWN_VALUE})
        row = {value: n + 1 for n, value in enumerate(values[field])}
        columns.append(np.array([row.get(cell, 0) for cell in cells]))
    feature_MF = np.concatenate([np.zeros((1, len(columns))), np.stack(columns, axis=1)]).astype(np.int64)
    return Vocabulary(fields=values, feature_MF=feature_MF)


def item_context(purchases: pa.Table, items: Sequence[str]) -> pa.Table:
    """Of these items the mean quantity that is bought at once, the words of their type, and of those that are bought at
    least twice the shares of the months in which they are, as a table of `models.item_context`.
    """
    products = pq.read_table(data_file("products"), columns=["product_id", "product_type"])
    ids = pa.array([int(item) for item in items])
    kinds = products["product_type"].take(pc.index_in(ids, products["product_id"].combine_chunks())).to_pylist()
    item_N = np.searchsorted(ids.to_numpy(), purchases["product_id"].to_numpy())
    bought_I = np.bincount(item_N, minlength=len(items))
    quantity_I = np.bincount(item_N, purchases["weight"].to_numpy(), len(items)) / bought_I
    month_N = pc.month(purchases["time_ms"].cast(pa.timestamp("ms"))).to_numpy() - 1
    share_IM = np.bincount(item_N * 12 + month_N, minlength=12 * len(items)).reshape(-1, 12) / bought_I[:, None]
    months = [share.tolist() if bought > 1 else None for share, bought in zip(share_IM, bought_I, strict=True)]
    return pa.table(
        {
            "item_id": list(items),
            "quantity": [repr(float(quantity)) for quantity in quantity_I],
            "words": [(kind or "").replace(" ", "|").replace("/", "|") for kind in kinds],
            "months": pa.array(months, pa.list_(pa.float32())),
        }
    )


def with_context(vocabulary: Vocabulary, purchases: pa.Table) -> Vocabulary:
    """With CONTEXT, as `jobs.examples.build_vocabulary` has it."""
    items = item_context(purchases, vocabulary.fields["item_id"])
    context, tags = fit_context(items, CONTEXT)
    of = context_of(items, context, tag_index(tags))
    return replace(
        vocabulary,
        feature_MF=np.c_[vocabulary.feature_MF, np.r_[np.zeros((1, context.columns), np.int64), of.row_NC]],
        context=context,
        tags=tags,
        vector_MP=np.r_[np.full((1, context.vector_width), np.nan, np.float32), of.vector_NP],
    )


def write_purchases(purchases: pa.Table, vocabulary: Vocabulary, plan: ExamplePlan, folder: Path) -> Path:
    """The examples of a plan over these purchases, as `jobs.examples.write_examples` writes them, in one file."""
    item_N = np.searchsorted(np.array(vocabulary.fields["item_id"], np.int64), purchases["product_id"].to_numpy()) + 1
    period_N = purchases["time_ms"].to_numpy() // plan.period_ms
    group_M = vocabulary.groups(plan.within)
    popularity = count_popularity(period_N, item_N, np.ones(len(item_N), np.int64), group_M, plan.period_ms)
    rows = pa.table(
        {
            "user_id": pc.cast(purchases["household_id"], pa.string()),
            "item": item_N,
            "action": purchases["action"],
            "time_ms": purchases["time_ms"],
            "weight": purchases["weight"],
            "offset": np.arange(len(item_N)),
        }
    )
    folder.mkdir(parents=True)
    made = timelines(rows, Items(popularity=popularity, group_M=group_M), plan, ACTIONS)
    pq.write_table(made, folder / "part-00000.parquet")
    np.save(folder / FEATURES, vocabulary.feature_MF)
    if vocabulary.vector_MP is not None:
        np.save(folder / VECTORS, vocabulary.vector_MP)
    return folder
