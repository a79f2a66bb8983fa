"""Rows of a log as of any offset, and which of its events may have been folded as of an unknown item."""

from __future__ import annotations

import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.audited_log import SETTLED_MS, _folder, _hasher, known_since_ms
from models.checkpoint import Checkpoint
from models.item_table import append_segments
from models.row import RowBytes, decode_row
from models.user_hash import hashed_user
from tests.jobs.test_backfill import FOLDED
from tests.small import START_MS
from tests.small_examples import ITEMS
from tests.small_ranker import scoring_checkpoint

NEW = "i77"
ENCODED_S = START_MS // 1000 + 1000
SCHEMA = FOLDED.append(pa.field("log_ms", pa.int64()))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """With an item that was encoded later."""
    made = scoring_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c")
    later = made.items_path / "run-00001" / "part.parquet"
    later.parent.mkdir()
    row = pq.read_table(made.items_path / "all.parquet").slice(1, 1)
    pq.write_table(row.set_column(0, row.schema.field(0), pa.array([NEW])), later)
    os.utime(later, (ENCODED_S, ENCODED_S))
    append_segments(made.items_path, made.checkpoint_id, [later])
    return made


def record(place: str, offset: int, item_id: str | None, log_ms: int) -> dict:
    columns = {"user_id": place, "offset": offset, "item_id": item_id, "partition": 0, "log_ms": log_ms}
    if item_id is None:
        return dict.fromkeys(SCHEMA.names) | columns
    return columns | {"action": "view", "event_time_ms": START_MS, "weight": 1.0, "event_hash": offset}


def folded(checkpoint: Checkpoint, *batches: list[dict]) -> dict[str, dict]:
    records = [pa.RecordBatch.from_pylist(batch, SCHEMA) for batch in batches]
    return {row["place"]: row for batch in _folder(checkpoint.path, 1)(iter(records)) for row in batch.to_pylist()}


def test_the_first_items_were_always_known_and_later_ones_since_a_while_after_their_segment(
    checkpoint: Checkpoint,
) -> None:
    since = known_since_ms(checkpoint.items_path)
    assert since.tolist() == [0] * (ITEMS + 1) + [ENCODED_S * 1000 + SETTLED_MS]


def test_a_place_is_folded_by_itself_and_says_whether_an_item_may_have_been_unknown(checkpoint: Checkpoint) -> None:
    early, late = ENCODED_S * 1000, ENCODED_S * 1000 + SETTLED_MS
    rows = [record("1 a", 0, "i1", early), record("1 a", 1, NEW, early)]
    rows += [record("2 b", 2, NEW, late), record("3 c", 3, "nothing", early), record("4 d", 4, None, early)]
    # All in one batch, and each in one of its own.
    for batches in ([rows], [[row] for row in rows]):
        found = folded(checkpoint, *batches)
        assert {place: row["later_items"] for place, row in found.items()} == {
            "1 a": True,
            "2 b": False,
            "3 c": False,
            "4 d": False,
        }
        data = {place: RowBytes(folded=row["folded"], recent=row["recent"]) for place, row in found.items()}
        counts = {place: decode_row(each, checkpoint.spec).count for place, each in data.items()}
        assert counts == {"1 a": 2, "2 b": 1, "3 c": 1, "4 d": 0}
        assert decode_row(data["1 a"], checkpoint.spec).recent["item"].tolist() == [1, ITEMS + 1]


def test_no_event_gives_no_row(checkpoint: Checkpoint) -> None:
    assert folded(checkpoint) == {}
    assert folded(checkpoint, []) == {}


def test_users_are_hashed_as_the_read_log_does(tmp_path: Path) -> None:
    key = b"a key of the tests, of 32 bytes."
    (tmp_path / "key").write_bytes(key)
    (batch,) = _hasher(tmp_path / "key")(iter([pa.record_batch({"user_id": pa.array(["u1", "ü"])})]))
    assert batch["user_hash"].to_pylist() == [hashed_user("u1", key), hashed_user("ü", key)]
    assert batch["user_id"].to_pylist() == ["u1", "ü"]
