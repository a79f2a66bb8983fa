"""The log is dense, ordered, partitioned by user, and the same input is in it once, whatever happened on the way."""

from __future__ import annotations

import csv
import shutil
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.ingest import EventSource, IngestReport, NewLog, ingest, ingest_items, log_facts, read_source
from models.errors import InputError
from models.event import Event, parse
from tests.jobs.processes import kill_when, start
from tests.jobs.tiny import logged, purchases, source, take, write_rows
from tests.small import START_MS

pytestmark = pytest.mark.spark

PARTITIONS = 3
COLUMNS = {
    "event_id": "trim(ref)",
    "user_id": "buyer",
    "item_id": "concat('i', product)",
    "action": "lower(verb)",
    "event_time_ms": "coalesce(try_cast(at AS BIGINT), unix_millis(to_timestamp(at)))",
}
GOOD = 60
# What is wrong with each bad row, and the reason in the quarantine.
BAD = [
    ({"ref": "no-buyer", "buyer": ""}, "schema"),
    ({"ref": "no-time", "at": ""}, "schema"),
    ({"ref": "word-time", "at": "yesterday"}, "schema"),
    ({"ref": "seconds", "at": str(START_MS // 1000)}, "event_time"),
    ({"ref": "  "}, "length"),
    ({"ref": "heavy", "weight": "heavy"}, "schema"),
    ({"ref": "zero", "weight": "0"}, "weight"),
    ({"ref": "r3"}, "repeated"),
]


def csv_rows() -> Iterator[dict[str, str]]:
    """GOOD rows in no order of time, a few with a time as text and most without a weight; then the bad ones."""
    for n in range(GOOD):
        yield {
            "ref": f"r{n}",
            "buyer": f"buyer {n % 7}",
            "product": str(n % 11),
            "verb": "BUY",
            "at": "2020-10-01 00:00:00" if n % 10 == 9 else str(START_MS + (n * 37 % GOOD) * 1000),
            "weight": "2.5" if n % 5 == 0 else "",
            "odd.name": "x",
        }
    for change, _ in BAD:
        yield {"ref": "bad", "buyer": "b", "product": "1", "verb": "BUY", "at": f"{START_MS + 99_000}"} | change


@dataclass(frozen=True, kw_only=True, slots=True)
class Story:
    """A file, the same file again, then one of which half is new: the reports, and the log after each."""

    log: Path
    reports: list[IngestReport]
    events: list[list[dict]]
    quarantined: list[list[dict]]


@pytest.fixture(scope="module")
def story(spark, tmp_path_factory: pytest.TempPathFactory) -> Story:
    folder = tmp_path_factory.mktemp("story")
    first, second = folder / "first.csv", folder / "second.parquet"
    with first.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["ref", "buyer", "product", "verb", "at", "weight", "odd.name"])
        writer.writeheader()
        writer.writerows(csv_rows())
    again = [{k: v for k, v in row.items() if k != "odd.name"} for row in csv_rows()][GOOD // 2 : GOOD]
    new = [row | {"ref": f"n-{row['ref']}", "at": str(START_MS - 5000 + n)} for n, row in enumerate(again)]
    write_rows(second, again + new)
    log = folder / "log"
    told = Story(log=log, reports=[], events=[], quarantined=[])
    for path in (first, first, second):
        told.reports.append(ingest(spark, source(path, **COLUMNS), log, NewLog(partitions=PARTITIONS)))
        told.events.append(logged(log))
        told.quarantined.append(logged(log, "quarantine"))
    return told


def test_every_row_is_an_event_or_quarantined(story: Story) -> None:
    assert story.reports[0] == IngestReport(read=GOOD + len(BAD), appended=GOOD, already=0, quarantined=len(BAD))
    assert {row["event_id"] for row in story.events[0]} == {f"r{n}" for n in range(GOOD)}
    assert Counter(row["reason"] for row in story.quarantined[0]) == Counter(reason for _, reason in BAD)


def test_the_quarantine_keeps_the_source_row_and_says_why(story: Story) -> None:
    (seconds,) = [row for row in story.quarantined[0] if row["reason"] == "event_time"]
    assert "seconds?" in seconds["detail"]
    assert f'"at":"{START_MS // 1000}"' in seconds["source"]
    (heavy,) = [row for row in story.quarantined[0] if "heavy" in row["source"]]
    assert "weight" in heavy["detail"]


def test_the_value_is_the_event(story: Story) -> None:
    for row in story.events[2]:
        fields = {name: row[name] for name in Event.__struct_fields__}
        assert parse(row["value"]) == Event(**fields)
    weights = {row["event_id"]: row["weight"] for row in story.events[0]}
    assert (weights["r0"], weights["r1"]) == (2.5, 1.0)
    assert {row["item_id"] for row in story.events[0]} == {f"i{n}" for n in range(11)}
    assert {row["action"] for row in story.events[0]} == {"buy"}


def test_a_users_events_share_the_partition_that_librdkafka_gives_the_key(story: Story) -> None:
    for row in story.events[2]:
        assert row["partition"] == crc32(row["user_id"].encode()) % PARTITIONS
    assert len({row["partition"] for row in story.events[2]}) == PARTITIONS


def test_offsets_are_dense_and_rise_with_time_within_an_ingest(story: Story) -> None:
    for events in (story.events[0], story.events[2]):
        for partition in range(PARTITIONS):
            mine = [row for row in events if row["partition"] == partition]
            assert [row["offset"] for row in mine] == list(range(len(mine)))
    for partition in range(PARTITIONS):
        times = [row["event_time_ms"] for row in story.events[0] if row["partition"] == partition]
        assert times == sorted(times)


def test_the_same_file_again_changes_nothing(story: Story) -> None:
    assert story.reports[1] == IngestReport(read=GOOD + len(BAD), appended=0, already=GOOD, quarantined=len(BAD))
    assert story.events[1] == story.events[0]
    assert sorted(r["digest"] for r in story.quarantined[1]) == sorted(r["digest"] for r in story.quarantined[0])


def test_of_an_overlapping_file_the_new_events_are_appended_after_the_old(story: Story) -> None:
    assert story.reports[2] == IngestReport(read=GOOD, appended=GOOD // 2, already=GOOD // 2, quarantined=0)
    # Their times are before all others; their offsets are after.
    old = [row for row in story.events[2] if not row["event_id"].startswith("n-")]
    assert old == story.events[0]


def test_the_log_says_its_partitions_and_epoch_to_spark_and_to_the_stream(spark, story: Story) -> None:
    from pipelines.delta_source import open_log

    log = open_log(story.log / "events")
    assert (facts := log_facts(spark, story.log / "events")).epoch == 1
    assert facts.partitions == PARTITIONS
    assert log.epoch == 1
    counts = Counter(row["partition"] for row in story.events[2])
    assert log.ends == {p: counts[p] - 1 for p in range(PARTITIONS)}


def test_two_ingests_at_once_give_no_offset_twice(spark, tmp_path: Path) -> None:
    take(spark, purchases(range(1), users=4), tmp_path / "log")
    days = [range(1, 4), range(3, 6)]

    def attempt(n: int) -> IngestReport | str:
        path = write_rows(tmp_path / f"{n}.parquet", purchases(days[n], users=4))
        try:
            return ingest(spark, source(path), tmp_path / "log")
        except InputError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(attempt, range(2)))
    refused = [n for n in range(2) if isinstance(found[n], str)]
    assert len(refused) < 2, found
    assert all("at the same time" in str(found[n]) for n in refused)
    assert_dense(logged(tmp_path / "log"))
    for n in refused:
        ingest(spark, source(tmp_path / f"{n}.parquet"), tmp_path / "log")
    assert_dense(logged(tmp_path / "log"))
    assert sorted(r["event_id"] for r in logged(tmp_path / "log")) == ids(purchases(range(6), users=4))


@pytest.mark.slow
def test_after_a_kill_the_same_command_completes_the_log(spark, tmp_path: Path) -> None:
    bad = [{"event_id": "bad", "user_id": "u0", "item_id": "i", "action": "view", "event_time_ms": 1, "weight": 1.0}]
    path, log = write_rows(tmp_path / "in.parquet", purchases() + bad), tmp_path / "log"
    command = ["ingest", "--input", path, "--log", log, "--partitions", 2]
    # Files of the commit are there, the commit is not, or not for long.
    kill_when(start(command, tmp_path), lambda: any((log / "events").glob("partition=*/*.parquet")))

    ingest(spark, source(path), log, NewLog(partitions=2))

    assert sorted(row["event_id"] for row in logged(log)) == ids(purchases())
    assert_dense(logged(log))
    assert [row["reason"] for row in logged(log, "quarantine")] == ["event_time"]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"path": Path("nowhere.parquet")}, "nowhere.parquet does not exist"),
        ({"format": "json"}, "'json' is not known; give csv or parquet"),
        ({"format": "parquet"}, "cannot be read as parquet; is --format right"),
        ({"columns": {}}, r"no column for \['event_id'.*\(its columns: ref, buyer"),
        ({"columns": COLUMNS | {"user_id": "purchaser"}}, "column expression cannot be used.*purchaser"),
        ({"columns": COLUMNS | {"user_id": "(buyer"}}, "column expression cannot be used"),
        ({"columns": COLUMNS | {"userid": "buyer"}}, r"\['userid'\] are no event fields"),
        ({"columns": COLUMNS | {"user_id": "raise_error(concat('no ', buyer))"}}, "cannot be read to its end.*no b"),
        ({"where": "price > 3"}, "--where 'price > 3' cannot be used.*price"),
        ({"where": "buyer = 'nobody'"}, "holds no rows; nothing was ingested"),
    ],
)
def test_what_cannot_be_ingested_is_refused_by_name(spark, tmp_path: Path, change: dict, words: str) -> None:
    path = tmp_path / "in.csv"
    path.write_text("ref,buyer,product,verb,at,weight\nr1,b,1,BUY,1600000000000,\n")
    settings = {"path": path, "format": "csv", "columns": COLUMNS} | change
    with pytest.raises(InputError, match=words) as refusal:
        ingest(spark, EventSource(**settings), tmp_path / "log")
    assert "\n" not in str(refusal.value)
    assert not (tmp_path / "log").exists()


def test_a_damaged_file_is_refused_by_name(spark, tmp_path: Path) -> None:
    write_rows(tmp_path / "in" / "a.parquet", purchases(range(1)))
    (tmp_path / "in" / "b.parquet").write_bytes(b"PAR1 no parquet file at all")
    with pytest.raises(InputError, match=r"cannot be read to its end.*b\.parquet"):
        ingest(spark, EventSource(path=tmp_path / "in", format="parquet", columns={}), tmp_path / "log")


def test_a_table_that_is_no_log_is_not_written_to(spark, tmp_path: Path) -> None:
    spark.range(3).write.format("delta").save(str(tmp_path / "log" / "events"))
    with pytest.raises(InputError, match=r"events is no event log: its table property 'vql\.epoch'"):
        take(spark, purchases(range(1)), tmp_path / "log")


def test_columns_that_are_not_declared_are_read_by_their_own_names(spark, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "in.parquet", purchases(range(1)))
    row = read_source(spark, source(path, item_id="upper(item_id)")).first()
    event = parse(row["value"].encode())
    assert (event.user_id, event.item_id) == ("u0", purchases(range(1))[0]["item_id"].upper())


def test_items_keep_the_declared_columns_as_text_and_are_replaced_whole(spark, tmp_path: Path) -> None:
    first = pa.table({"sku": [1, 2], "kind": ["a", None], "price": [1.5, 2.5]})
    pq.write_table(first, tmp_path / "items.parquet")
    columns = {"item_id": "concat('i', sku)", "category": "kind"}
    assert ingest_items(spark, tmp_path / "items.parquet", "parquet", columns, tmp_path) == 2
    found = sorted(logged(tmp_path, "items"), key=lambda row: row["item_id"])
    assert found == [{"item_id": "i1", "category": "a"}, {"item_id": "i2", "category": None}]

    shutil.rmtree(tmp_path / "items.parquet", ignore_errors=True)
    (tmp_path / "items.csv").write_text("item_id,brand\n7,b\n")
    assert ingest_items(spark, tmp_path / "items.csv", "csv", {"brand": "brand"}, tmp_path) == 1
    assert logged(tmp_path, "items") == [{"item_id": "7", "brand": "b"}]


def test_arrays_of_items_stay_arrays(spark, tmp_path: Path) -> None:
    rows = [
        {"item_id": "i1", "tags": ["a", "b"], "image": [1.5, 0.1], "price": 0.1},
        {"item_id": "i2", "tags": None, "image": None, "price": None},
    ]
    columns = {name: name for name in ("tags", "image", "price")}
    assert ingest_items(spark, write_rows(tmp_path / "items.parquet", rows), "parquet", columns, tmp_path) == 2
    one, two = logged(tmp_path, "items")
    # As float32 has it; a number is text, of the same value.
    assert one == {"item_id": "i1", "tags": ["a", "b"], "image": [1.5, float(np.float32(0.1))], "price": "0.1"}
    assert two == {"item_id": "i2", "tags": None, "image": None, "price": None}
    csv = tmp_path / "items.csv"
    csv.write_text('item_id,image\n7,"[1.5, 0.1]"\n8,\n9,"nonsense"\n')
    ingest_items(spark, csv, "csv", {"image": "from_json(image, 'array<float>')"}, tmp_path)
    assert [row["image"] for row in logged(tmp_path, "items")] == [one["image"], None, None]


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        ("item_id\ni1\ni1\ni2\n", {}, "holds 2 rows of item 'i1'"),
        ("item_id,c\n,x\ni2,y\n", {"c": "c"}, "holds 1 rows of item None"),
        ("item_id\n", {}, "holds no rows"),
        ("sku\n1\n", {}, "no column item_id"),
        ("item_id\n1\n", {"category": "kind"}, "column expression cannot be used"),
    ],
)
def test_items_that_cannot_be_used_are_refused(spark, tmp_path: Path, rows: str, columns: dict, words: str) -> None:
    (tmp_path / "items.csv").write_text(rows)
    with pytest.raises(InputError, match=words):
        ingest_items(spark, tmp_path / "items.csv", "csv", columns, tmp_path)
    assert not (tmp_path / "items").exists()


def assert_dense(events: list[dict]) -> None:
    for partition in {row["partition"] for row in events}:
        offsets = [row["offset"] for row in events if row["partition"] == partition]
        assert offsets == list(range(len(offsets)))


def ids(rows: list[dict]) -> list[str]:
    return sorted(row["event_id"] for row in rows)
