"""What Delta keeps of a deleted row goes with the purge, and offsets stay unique whoever appends at the same time."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest
from deltalake import DeltaTable

from jobs.forget_scan import scan_folder
from jobs.forget_tables import Target, append_tombstone, blank_tombstones, erase_events, partitions_of, purge
from models.forgotten import Request
from pipelines.delta_source import open_log
from tests.jobs.forgettable import NEARLY, WHO, make_log, some_events
from tests.pipelines.small_log import set_properties

KEY = bytes(range(32))


@pytest.fixture
def events(tmp_path: Path) -> Path:
    return make_log(tmp_path / "log", some_events()) / "events"


def target(events: Path, tmp_path: Path, user_id: str = WHO) -> Target:
    (partition,) = partitions_of(events, user_id, 1)
    offset = append_tombstone(events, user_id, 1, partition)
    return Target(user_id=user_id, requests=[Request(1, partition, offset, 0)], key=KEY)


def left(events: Path) -> set[str]:
    """The kinds of files that hold the user."""
    return {Path(found.where).suffix for found in scan_folder(events, WHO, "")}


def test_a_deletion_alone_leaves_the_user_in_old_files_and_in_commits(events: Path, tmp_path: Path) -> None:
    who = target(events, tmp_path)
    erase_events(events, who)
    blank_tombstones(events, who)
    assert left(events) == {".parquet", ".json"}
    held = DeltaTable(events).to_pyarrow_table(columns=["user_id"])["user_id"].to_pylist()
    assert WHO not in held
    assert purge(events, 0) > 0
    assert left(events) == set()
    assert DeltaTable(events).to_pyarrow_table(columns=["user_id"])["user_id"].to_pylist() == held


def test_what_readers_may_need_stays_for_as_long_as_it_is_told(events: Path, tmp_path: Path) -> None:
    before = DeltaTable(events).version()
    erase_events(events, target(events, tmp_path))
    purge(events, 3 * 3600.0)
    assert DeltaTable(events, version=before).to_pyarrow_table().num_rows == len(some_events())
    old_s = time.time() - 4 * 3600.0
    for path in (events / "_delta_log").iterdir():
        os.utime(path, (old_s, old_s))
    purge(events, 3 * 3600.0)
    assert not (events / "_delta_log" / f"{before:020}.json").exists()
    assert DeltaTable(events).to_pyarrow_table().num_rows < len(some_events())


def test_the_ends_of_the_log_stay_and_so_does_its_identity(events: Path, tmp_path: Path) -> None:
    who = target(events, tmp_path)
    before = open_log(events)
    for step in (erase_events, blank_tombstones):
        step(events, who)
    purge(events, 0)
    assert open_log(events) == before
    (row,) = [row for row in DeltaTable(events).to_pyarrow_table().to_pylist() if row["user_id"] is None]
    assert (row["partition"], row["offset"], row["value"]) == (*who.requests[0][1:3], None)
    assert before.ends[row["partition"]] == row["offset"]


def test_an_id_with_quotes_is_an_id(events: Path, tmp_path: Path) -> None:
    name = "o'brien\\ OR ''=''; --"
    places = Target(user_id=name, requests=[Request(1, 0, 10**6, 0)], key=KEY)
    before = DeltaTable(events).to_pyarrow_table().num_rows
    assert erase_events(events, places) == 0
    append_tombstone(events, name, 1, 0)
    assert erase_events(events, places) == 1
    assert DeltaTable(events).to_pyarrow_table().num_rows == before


def test_two_who_append_at_once_get_two_places(events: Path) -> None:
    placed: list[int] = []
    threads = [
        threading.Thread(target=lambda n=n: placed.append(append_tombstone(events, f"{WHO}-{n}", 1, 0)))
        for n in range(6)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    end = max(placed) - 5
    assert sorted(placed) == list(range(end, end + 6))


def test_old_epochs_go_and_nobody_elses_partition_is_looked_at(events: Path, tmp_path: Path) -> None:
    set_properties(DeltaTable(events), {"vql.epoch": "2"})
    assert partitions_of(events, WHO, 2) == []
    mine = sum(event.user_id == WHO for event in some_events())
    who = Target(user_id=WHO, requests=[Request(2, 0, 0, 0)], key=KEY)
    assert erase_events(events, who) == mine
    names = DeltaTable(events).to_pyarrow_table(columns=["user_id"])["user_id"].to_pylist()
    assert names.count(NEARLY) == sum(event.user_id == NEARLY for event in some_events())
