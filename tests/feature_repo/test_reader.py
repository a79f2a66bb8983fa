from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_repo.reader import Reader
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowPut
from models.attention import CacheBatch
from models.errors import MismatchError
from models.item_table import UNKNOWN
from models.row import encode_row, whole_cache
from tests.feature_repo.rows import put_all, small_rows
from tests.small import small_checkpoint, write_items


@pytest.fixture
def rows(tmp_path):
    return SqliteRows(tmp_path / "online.db")


@pytest.fixture
def reader(rows, checkpoint, fold):
    return Reader(rows, checkpoint, fold)


def overwrite(rows, checkpoint, user_id, row, *, folded=None, recent=None):
    """Put other bytes than the row's own in the place of a stored row."""
    data = encode_row(row)
    rows.delete_user(user_id)
    put = RowPut(
        user_id=user_id,
        stamp=row.stamp,
        recent=recent or data.recent,
        folded=folded or data.folded,
    )
    assert rows.put_rows(checkpoint.checkpoint_id, [put]) == [True]


def assert_same(a: CacheBatch, b: CacheBatch) -> None:
    for name in CacheBatch.__slots__:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_what_is_read_is_the_whole_cache_of_every_user_absent_ones_too(rows, reader, checkpoint, fold):
    stored = small_rows(checkpoint, fold, 400)
    put_all(rows, checkpoint, stored)
    user_ids = ["nobody", *stored, "nobody else", "u0"]
    read = reader.read(user_ids)
    expected = [whole_cache(stored[u], fold) if u in stored else None for u in user_ids]
    assert_same(read.caches, CacheBatch.of(fold.spec, expected))
    assert read.missing == {"nobody": "absent", "nobody else": "absent"}
    assert read.caches.present_B.tolist() == [u in stored for u in user_ids]
    assert int(read.caches.count_B.sum()) == 400 + stored["u0"].count
    assert any(len(row.recent) for row in stored.values())


def test_no_users_is_an_empty_batch(reader):
    read = reader.read([])
    assert len(read.caches.present_B) == 0
    assert (read.missing, read.unknown_items) == ({}, 0)


def flip(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def test_bad_rows_are_named_counted_and_do_not_disturb_the_others(rows, reader, checkpoint, other_checkpoint, fold):
    stored = small_rows(checkpoint, fold, 400)
    put_all(rows, checkpoint, stored)
    foreign = small_rows(other_checkpoint, other_checkpoint.fold(), 400)
    data = {u: encode_row(row) for u, row in stored.items()}
    overwrite(rows, checkpoint, "u0", stored["u0"], folded=flip(data["u0"].folded, 100))
    overwrite(rows, checkpoint, "u1", stored["u1"], recent=flip(data["u1"].recent, 70))
    overwrite(rows, checkpoint, "u2", stored["u2"], recent=data["u2"].recent[:50])
    overwrite(rows, checkpoint, "u3", foreign["u3"])
    read = reader.read([*stored, "nobody"])
    assert read.missing == {
        "u0": "damaged",
        "u1": "damaged",
        "u2": "damaged",
        "u3": "foreign",
        "nobody": "absent",
    }
    assert read.missing_counts == {"damaged": 3, "foreign": 1, "absent": 1}
    expected = [None if u in read.missing else whole_cache(stored[u], fold) for u in [*stored, "nobody"]]
    assert sum(cache is not None for cache in expected) >= 3
    assert_same(read.caches, CacheBatch.of(fold.spec, expected))


def test_the_rows_themselves_can_be_had(rows, reader, checkpoint, fold):
    stored = small_rows(checkpoint, fold, 100)
    put_all(rows, checkpoint, stored)
    found, missing = reader.read_rows(["u0", "nobody"])
    assert encode_row(found[0]) == encode_row(stored["u0"])
    assert (found[1], missing) == (None, {"nobody": "absent"})


def test_an_item_that_the_readers_table_does_not_hold_yet_is_read_as_unknown_and_counted(rows, tmp_path):
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    before = checkpoint.fold()
    write_items(checkpoint, [f"new{n}" for n in range(1, 51)], "items-00001.parquet", seed=5)
    after = checkpoint.fold()
    assert len(after.table) > len(before.table)
    stored = small_rows(checkpoint, after, 400)
    put_all(rows, checkpoint, stored)
    beyond = sum(int((row.recent["item"] >= len(before.table)).sum()) for row in stored.values())
    assert beyond > 0
    stale, fresh = (
        Reader(rows, checkpoint, before).read(list(stored)),
        Reader(rows, checkpoint, after).read(list(stored)),
    )
    assert (stale.unknown_items, fresh.unknown_items) == (beyond, 0)
    assert stale.missing == fresh.missing == {}
    assert torch.equal(stale.caches.count_B, fresh.caches.count_B)
    row = next(row for row in stored.values() if (row.recent["item"] >= len(before.table)).any())
    assert not np.array_equal(after.encode(row.recent).code_NG, after.encode(_as_unknown(row.recent, before)).code_NG)


def _as_unknown(recent, before):
    recent = recent.copy()
    recent["item"][recent["item"] >= len(before.table)] = UNKNOWN
    return recent


def test_a_fold_of_another_checkpoint_is_refused(rows, checkpoint, other_checkpoint):
    with pytest.raises(MismatchError, match=other_checkpoint.checkpoint_id):
        Reader(rows, checkpoint, other_checkpoint.fold())


def test_the_bytes_are_those_that_feast_serves_for_every_user(feast, checkpoint, fold):
    from feature_repo.repo import register, rows_of
    from feature_repo.views import service_name, view_name

    register(feast, checkpoint.checkpoint_id)
    rows = rows_of(feast)
    stored = small_rows(checkpoint, fold, 400)
    put_all(rows, checkpoint, stored)
    user_ids = ["nobody", *stored, "u0", "line\nbreak"]
    read = rows.get_rows(checkpoint.checkpoint_id, user_ids)
    entities = [{"user_id": user_id} for user_id in user_ids]
    view = view_name(checkpoint.checkpoint_id)
    for features in (
        feast.get_feature_service(service_name(checkpoint.checkpoint_id)),
        [f"{view}:folded", f"{view}:recent"],
    ):
        served = feast.get_online_features(features=features, entity_rows=entities).to_dict()
        assert served["user_id"] == user_ids
        assert served["folded"] == [None if row is None else row.folded for row in read]
        assert served["recent"] == [None if row is None else row.recent for row in read]
    assert Reader(rows, checkpoint, fold).read(user_ids).missing == {"nobody": "absent", "line\nbreak": "absent"}
