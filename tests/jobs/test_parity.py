"""The independent check finds nothing in good rows, and each fault that is planted."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.store import whole_put
from jobs.backfill import backfill
from jobs.parity import compare_rows, in_chunks, raw_users
from models.checkpoint import Checkpoint
from models.row import Row, decode_row
from models.wire import decode_counts, encode_folded
from tests.jobs.tiny import logged, purchases, take
from tests.small import HOUR_MS, START_MS
from tests.small_ranker import COUNTS, scoring_checkpoint

pytestmark = pytest.mark.spark

USERS, PARTITIONS = 5, 4
PARITY_MAX = 1e-4
SOMEONE = "u3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return scoring_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", counts=COUNTS)


@pytest.fixture(scope="module")
def log(spark, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Few users for many partitions, one of which is empty; and u1 takes a third of everything back."""
    rows = purchases(users=USERS)
    back = [row | {"event_id": f"back-{row['event_id']}", "weight": -1.0} for row in rows if row["user_id"] == "u1"]
    log = tmp_path_factory.mktemp("parity") / "log"
    take(spark, rows + back[::3], log, PARTITIONS)
    return log


@pytest.fixture
def reader(spark, checkpoint: Checkpoint, log: Path, tmp_path: Path) -> Reader:
    store = StoreHandle(state=tmp_path)
    backfill(spark, checkpoint, log, store)
    return Reader(store.open(), Opened(checkpoint))


def row_of(reader: Reader, user_id: str) -> Row:
    (data,) = reader.rows.get_rows(reader.checkpoint.checkpoint_id, [user_id])
    assert data is not None
    return decode_row(data, reader.fold.spec)


def plant(reader: Reader, row: Row) -> None:
    """Put this row for SOMEONE, by raising the revision."""
    put = whole_put(SOMEONE, replace(row, stamp=replace(row.stamp, revision=1)))
    assert reader.rows.put_rows(reader.checkpoint.checkpoint_id, [put]) == [True]


def test_a_wrong_count_in_one_row_is_found(reader: Reader, log: Path) -> None:
    row = row_of(reader, SOMEONE)
    counts = decode_counts(row.folded_data, COUNTS.spec(row.spec.checkpoint_id))
    wrong = dataclasses.replace(counts, mass_NPR=counts.mass_NPR + np.float32(0.01))
    plant(reader, replace(row, folded_data=encode_folded(row.folded, row.folded_stamp, wrong)))
    assert compare_rows(reader, log).max_abs_error > PARITY_MAX


def test_the_rows_of_a_backfill_are_the_definition(reader: Reader, log: Path) -> None:
    assert len({row["partition"] for row in logged(log)}) < PARTITIONS
    found = compare_rows(reader, log)
    assert found.users == USERS
    assert found.conserved
    assert found.row_events == found.log_events == len(logged(log))
    assert found.max_abs_error < PARITY_MAX


def test_a_wrong_row_is_found(reader: Reader, log: Path) -> None:
    row = row_of(reader, SOMEONE)
    recent = row.recent.copy()
    recent["item"][0] = recent["item"][0] % 20 + 1
    plant(reader, replace(row, recent_data=recent.tobytes()))
    found = compare_rows(reader, log)
    assert found.max_abs_error > 0.01
    assert found.conserved


def test_a_missing_row_is_found(reader: Reader, log: Path) -> None:
    reader.rows.delete_user(SOMEONE)
    found = compare_rows(reader, log)
    assert (found.users, found.missing, found.conserved) == (USERS, 1, False)
    assert found.max_abs_error > 0.01


def test_an_event_folded_twice_is_found(reader: Reader, log: Path) -> None:
    row = row_of(reader, SOMEONE)
    again = row.recent[-1:].copy()
    # At an offset of its own: a reader refuses a row that holds one offset twice.
    again["position"] += np.uint64(row.stamp.offset + 1 - (int(again["position"][0]) >> 16)) << np.uint64(16)
    stamp = replace(row.stamp, offset=row.stamp.offset + 1)
    plant(reader, replace(row, recent_data=row.recent_data + again.tobytes(), stamp=stamp))
    found = compare_rows(reader, log)
    assert not found.conserved
    assert found.row_events == found.log_events + 1
    assert found.max_abs_error > PARITY_MAX


def test_a_row_of_the_right_count_and_wrong_time_is_found(reader: Reader, log: Path) -> None:
    row = row_of(reader, SOMEONE)
    recent = row.recent.copy()
    recent["time"][0] -= np.uint64(HOUR_MS) << np.uint64(16)
    plant(reader, replace(row, recent_data=recent.tobytes()))
    assert compare_rows(reader, log).max_abs_error > PARITY_MAX


def test_every_user_comes_once_with_all_events(log: Path) -> None:
    users = list(raw_users(log))
    assert sorted(user_id for user_id, _ in users) == sorted({row["user_id"] for row in logged(log)})
    for user_id, events in users:
        assert set(events["user_id"].to_pylist()) == {user_id}
        assert events.num_rows == sum(row["user_id"] == user_id for row in logged(log))
        assert min(events["event_time_ms"].to_pylist()) >= START_MS


def test_chunks_are_full_but_for_the_last() -> None:
    assert list(in_chunks(iter(range(5)), 2)) == [[0, 1], [2, 3], [4]]
    assert list(in_chunks(iter(range(4)), 2)) == [[0, 1], [2, 3]]
    assert list(in_chunks(iter([]), 2)) == []
