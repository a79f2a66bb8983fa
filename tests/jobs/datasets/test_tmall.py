"""Tmall's log: a day for a time, equal rows that are events of their own, items from the events."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.datasets.published import items, prepared, write_files
from tests.jobs.tiny import logged

FILES = {
    "user_log_format1.csv": "user_id,item_id,cat_id,seller_id,brand_id,time_stamp,action_type\n"
    "328862,323294,833,2882,2661,829,0\n"
    "328862,323294,833,2882,2661,829,0\n"
    "328862,844400,1271,2882,2661,0511,2\n"
    "17,844400,1271,2882,2661,1111,3\n"
    "17,575153,1271,2883,,1111,1\n"
}
DAY_MS = 86_400_000
MAY_11, AUGUST_29, NOVEMBER_11 = 1_399_766_400_000, 1_409_270_400_000, 1_415_664_000_000


@pytest.mark.spark
def test_a_day_is_a_time_and_equal_rows_are_events_of_their_own(spark, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "data_format1", FILES)
    done = prepared(spark, "tmall", folder, tmp_path / "log")
    assert (done.events.appended, done.events.quarantined, done.items) == (5, 0, 3)
    found = sorted((row["event_id"], row["event_time_ms"], row["action"]) for row in logged(tmp_path / "log"))
    assert found == [
        ("17-575153-1111-1-1", NOVEMBER_11, "cart"),
        ("17-844400-1111-3-1", NOVEMBER_11, "favourite"),
        ("328862-323294-829-0-1", AUGUST_29, "click"),
        ("328862-323294-829-0-2", AUGUST_29, "click"),
        ("328862-844400-0511-2-1", MAY_11, "purchase"),
    ]
    assert items(tmp_path / "log")["575153"] == {"category": "1271", "seller": "2883", "brand": None}
    assert items(tmp_path / "log")["323294"] == {"category": "833", "seller": "2882", "brand": "2661"}
    again = prepared(spark, "tmall", folder, tmp_path / "log")
    assert (again.events.appended, again.events.already) == (0, 5)
