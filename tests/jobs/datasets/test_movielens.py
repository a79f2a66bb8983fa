"""MovieLens as published, and files like it by a map of columns."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.commands import assert_one_line
from tests.jobs.datasets.published import events, items, prepared, write_files

FILES = {
    "ratings.csv": "userId,movieId,rating,timestamp\n1,296,5.0,1147880044\n1,306,3.5,1147868817\n",
    # A title with a comma and doubled quotes.
    "movies.csv": 'movieId,title,genres\n296,"Fiction, ""Pulp"" (1994)",Comedy|Crime\n306,Red (1994),Drama\n',
}


@pytest.mark.spark
def test_ratings_of_four_and_more_are_likes(spark, tmp_path: Path) -> None:
    done = prepared(spark, "movielens", write_files(tmp_path / "ml-25m", FILES), tmp_path / "log")
    assert (done.events.appended, done.items) == (2, 2)
    assert events(tmp_path / "log") == {
        ("1", "296", 1147880044000): ("1-296-1147880044", "like"),
        ("1", "306", 1147868817000): ("1-306-1147868817", "rating"),
    }
    assert items(tmp_path / "log") == {
        "296": {"category": "Comedy", "tags": "Comedy|Crime"},
        "306": {"category": "Drama", "tags": "Drama"},
    }


@pytest.mark.spark
def test_files_like_it_are_read_by_a_map_of_columns(vql, spark, tmp_path: Path) -> None:
    folder = write_files(
        tmp_path / "shop",
        {
            "buys.csv": "order,customer,sku,bought_at\no1,c1,s1,2020-10-01 00:00:00\n",
            "products.csv": "sku,kind,labels\ns1,tea,green|hot\n",
        },
    )
    names = ["--file", "events=buys.csv", "--file", "items=products.csv"]
    mapped = [
        *("--column", "user_id=customer", "--column", "item_id=sku", "--column", "event_id=concat(order, sku)"),
        *("--column", "event_time_ms=unix_millis(to_timestamp(bought_at))", "--column", "action='purchase'"),
        *("--item-column", "item_id=sku", "--item-column", "category=kind", "--item-column", "tags=labels"),
    ]
    said = vql("data", "prepare", "movielens", "--path", folder, "--log", tmp_path / "log", *names, *mapped)
    assert said.code == 0, said
    assert "1 rows read: 1 events appended, 0 already in the log, 0 quarantined; 1 items" in said.out
    assert events(tmp_path / "log") == {("c1", "s1", 1601510400000): ("o1s1", "purchase")}
    assert items(tmp_path / "log") == {"s1": {"category": "tea", "tags": "green|hot"}}
    said = vql("data", "prepare", "movielens", "--path", folder, "--log", tmp_path / "other", *names)
    assert_one_line(said, 2, "InputError", str(folder), "column expression cannot be used", "userId")
