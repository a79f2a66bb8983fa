"""Tmall: half a year of clicks, carts, purchases and favourites, from the IJCAI-15 contest (user_log_format1.csv).

`time_stamp` is month and day without a year and often without the leading zero (511 is the 11th of May); the year is
2014, and all events of a day have the day's time, in no known order: a basket is a day. The same row may come many
times, each a click of its own, so equal rows are numbered. Some rows have no brand. There is no file of items: their
category, seller and brand stand with the events; of several, the smallest is taken.

Terms: of the Tianchi platform; to be fetched there by oneself.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.datasets.dataset import DataSet, Read, SourceFile

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

# By the number that the file has for them.
ACTIONS = ("click", "cart", "purchase", "favourite")
FACTS = ("user_id", "item_id", "time_stamp", "action_type")


def _numbered(read: Read) -> DataFrame:
    """Equal rows with their number among them."""
    equal = ", ".join(FACTS)
    return read("log").selectExpr("*", f"row_number() OVER (PARTITION BY {equal} ORDER BY {equal}) AS copy")


def _items(read: Read) -> DataFrame:
    names = ("cat_id", "seller_id", "brand_id")
    found = read("log").where("coalesce(item_id, '') <> ''").groupBy("item_id").agg(dict.fromkeys(names, "min"))
    return found.selectExpr("item_id", *(f"`min({name})` AS {name}" for name in names))


TMALL = DataSet(
    name="tmall",
    about="54.9 million clicks, carts, purchases and favourites of 424,170 users in half a year, by the day",
    terms="the terms of the Tianchi platform (IJCAI-15, format 1); not part of this package",
    files={"log": SourceFile(name="user_log_format1.csv", columns=(*FACTS, "cat_id", "seller_id", "brand_id"))},
    events=_numbered,
    columns={
        "event_id": "concat_ws('-', user_id, item_id, time_stamp, action_type, copy)",
        "user_id": "user_id",
        "item_id": "item_id",
        "action": f"element_at(array{ACTIONS}, int(action_type) + 1)",
        "event_time_ms": "unix_millis(to_timestamp(concat('2014', lpad(time_stamp, 4, '0')), 'yyyyMMdd'))",
    },
    items=_items,
    item_columns={"item_id": "item_id", "category": "cat_id", "seller": "seller_id", "brand": "brand_id"},
    fields=("category", "seller", "brand"),
)
