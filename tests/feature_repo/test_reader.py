from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from feature_repo.opened import LOOK_EVERY_S, Opened
from feature_repo.reader import Reader, ReadLimits
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowPut, RowStore
from models.attention import CacheBatch
from models.checkpoint import Checkpoint
from models.dense_kernel import dense_kernel
from models.errors import StoreError
from models.row import Fold, Row, encode_row, whole_cache
from tests.feature_repo.plain_reader import read_plainly
from tests.feature_repo.rows import put_all, small_rows
from tests.small import small_checkpoint, write_items


@pytest.fixture
def rows(store: RowStore) -> RowStore:
    """Each of the stores."""
    return store


@pytest.fixture
def reader(rows: RowStore, checkpoint: Checkpoint) -> Iterator[Reader]:
    made = Reader(rows, Opened(checkpoint), ReadLimits(deadline_s=10.0))
    yield made
    made.close()


def overwrite(rows: RowStore, checkpoint: Checkpoint, user_id: str, row: Row, **parts: bytes) -> None:
    """Put other bytes than the row's own in the place of a stored row."""
    data = encode_row(row)
    rows.delete_user(user_id)
    put = RowPut(
        user_id=user_id,
        stamp=row.stamp,
        recent=parts.get("recent", data.recent),
        folded=parts.get("folded", data.folded),
    )
    assert rows.put_rows(checkpoint.checkpoint_id, [put]) == [True]


def assert_same(a: CacheBatch, b: CacheBatch) -> None:
    for name in CacheBatch.__slots__:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def assert_as_plain(reader: Reader, user_ids: list[str]) -> None:
    """The reader's answer, in both forms, is that of its plain twin."""
    stored = reader.rows.get_rows(reader.checkpoint.checkpoint_id, user_ids)
    caches, missing, unknown_items = read_plainly(user_ids, stored, reader.fold)
    for read in (reader.read(user_ids), asyncio.run(reader.read_async(user_ids))):
        assert_same(read.caches, caches)
        assert (read.missing, read.stale, read.unknown_items) == (missing, {}, unknown_items)


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
    assert_as_plain(reader, user_ids)


def test_kernels_are_compiled_before_the_first_read_could_be_late_for_it(rows, checkpoint, fold):
    dense_kernel.cache_clear()
    reader = Reader(rows, Opened(checkpoint), ReadLimits(deadline_s=30.0))
    kernel = dense_kernel(fold.spec.heads // fold.spec.groups, fold.spec.rates, fold.spec.value_width)
    compiled = list(kernel.signatures)
    put_all(rows, checkpoint, small_rows(checkpoint, fold, 100))
    reader.read(["u0", "u1", "nobody"])
    reader.close()
    assert compiled
    assert list(kernel.signatures) == compiled


def test_no_users_is_an_empty_batch(rows, reader, checkpoint):
    put_all(rows, checkpoint, {})
    read = reader.read([])
    assert len(read.caches.present_B) == 0
    assert (read.missing, read.stale, read.unknown_items) == ({}, {}, 0)


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
    assert Counter(read.missing.values()) == {"damaged": 3, "foreign": 1, "absent": 1}
    expected = [None if u in read.missing else whole_cache(stored[u], fold) for u in [*stored, "nobody"]]
    assert sum(cache is not None for cache in expected) >= 3
    assert_same(read.caches, CacheBatch.of(fold.spec, expected))
    assert_as_plain(reader, [*stored, "nobody"])
    counted = reader.metrics.registry.get_sample_value
    assert counted("vql_reader_users_total", {"outcome": "damaged"}) == 3 * 3
    assert counted("vql_reader_users_total", {"outcome": "fresh"}) == 3 * (len(stored) - 4)
    assert counted("vql_reader_reads_total") == counted("vql_reader_read_seconds_count") == 3


def test_the_rows_themselves_can_be_had(rows, reader, checkpoint, fold):
    stored = small_rows(checkpoint, fold, 100)
    put_all(rows, checkpoint, stored)
    found, missing = reader.read_rows(["u0", "nobody"])
    assert encode_row(found[0]) == encode_row(stored["u0"])
    assert (found[1], missing) == (None, {"nobody": "absent"})


class Clock:
    """Seconds that the test turns."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_items_that_the_readers_table_does_not_hold_yet_are_unknown_until_it_has_looked(rows, tmp_path):
    checkpoint, clock = small_checkpoint(tmp_path / "checkpoint"), Clock()
    opened = Opened(checkpoint, clock)
    reader = Reader(rows, opened, ReadLimits(deadline_s=10.0))
    before = opened.loaded
    write_items(checkpoint, [f"new{n}" for n in range(1, 51)], "items-00001.parquet", seed=5)
    stored = small_rows(checkpoint, checkpoint.fold(), 400)
    put_all(rows, checkpoint, stored)
    beyond = sum(int((row.recent["item"] >= len(before.table)).sum()) for row in stored.values())
    assert beyond > 0

    stale = reader.read(list(stored))
    assert (stale.unknown_items, stale.missing) == (beyond, {})
    assert_as_plain(reader, list(stored))

    clock.now_s += LOOK_EVERY_S
    reader.read(list(stored))
    deadline_s = time.monotonic() + 30
    while opened.loaded is before:
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
    fresh = reader.read(list(stored))
    assert fresh.unknown_items == 0
    assert torch.equal(fresh.caches.count_B, stale.caches.count_B)
    assert not torch.equal(fresh.caches.mean_BHKRD, stale.caches.mean_BHKRD)
    assert_as_plain(reader, list(stored))
    reader.close()


def test_a_row_older_than_the_one_read_before_is_not_given(rows, reader, checkpoint, fold):
    new = small_rows(checkpoint, fold, 400)
    old = small_rows(checkpoint, fold, 200)
    put_all(rows, checkpoint, new)
    before = reader.read(list(new))
    overwrite(rows, checkpoint, "u1", old["u1"])

    after = reader.read(list(new))

    assert old["u1"].stamp.order < new["u1"].stamp.order
    assert after.stale == {"u1": "regressed"}
    assert_same(after.caches, before.caches)
    assert reader.metrics.registry.get_sample_value("vql_reader_users_total", {"outcome": "stale_regressed"}) == 1


def test_an_erased_user_is_absent_at_once_and_stays_so(rows, reader, checkpoint, fold):
    put_all(rows, checkpoint, small_rows(checkpoint, fold, 200))
    assert reader.read(["u0", "u1"]).missing == {}
    rows.delete_user("u0")
    assert reader.read(["u0", "u1"]).missing == {"u0": "absent"}


def test_a_store_that_was_never_filled_is_refused_and_one_that_is_filled_then_is_read(rows, reader, checkpoint, fold):
    with pytest.raises(StoreError, match=r"neither a backfill nor positions .* run vql backfill"):
        reader.read(["u0"])
    # A stream that has only begun has put nothing yet.
    rows.commit_positions(checkpoint.checkpoint_id, 1, {0: -1})
    with pytest.raises(StoreError, match="neither a backfill nor positions"):
        asyncio.run(reader.read_async(["u0"]))
    assert reader.metrics.registry.get_sample_value("vql_reader_refused_total") == 2
    put_all(rows, checkpoint, small_rows(checkpoint, fold, 200))
    assert reader.read(["u0"]).missing == {}


def test_an_embedded_store_that_is_replaced_in_use_is_refused_until_it_is_filled(tmp_path: Path, checkpoint, fold):
    rows = SqliteRows(tmp_path / "online.db")
    reader = Reader(rows, Opened(checkpoint), ReadLimits(deadline_s=10.0))
    stored = small_rows(checkpoint, fold, 200)
    put_all(rows, checkpoint, stored)
    assert reader.read(["u0"]).missing == {}
    for file in tmp_path.glob("online.db*"):
        file.unlink()
    with pytest.raises(StoreError, match="was removed or replaced while in use"):
        reader.read(["u0"])
    with pytest.raises(StoreError, match="neither a backfill nor positions"):
        reader.read(["u0"])
    put_all(SqliteRows(tmp_path / "online.db"), checkpoint, stored)
    assert reader.read(["u0"]).missing == {}
    reader.close()


def test_a_user_id_that_is_no_text_is_the_callers_fault(rows, reader, checkpoint, fold):
    from models.errors import InputError

    put_all(rows, checkpoint, small_rows(checkpoint, fold, 200))
    with pytest.raises(InputError, match="is not Unicode text"):
        reader.read(["u0", "\ud800"])


def test_the_result_is_that_of_the_bytes_that_feast_serves_for_every_user(feast, chosen, checkpoint, fold: Fold):
    from feature_repo.repo import register, rows_of
    from feature_repo.views import service_name, view_name
    from models.row import RowBytes

    register(feast, checkpoint.checkpoint_id)
    rows = rows_of(feast)
    stored = small_rows(checkpoint, fold, 400)
    put_all(rows, checkpoint, stored)
    user_ids = ["nobody", *stored, "u0", "line\nbreak"]
    entities = [{"user_id": user_id} for user_id in user_ids]
    view = view_name(checkpoint.checkpoint_id)
    reader = Reader(rows, Opened(checkpoint), ReadLimits(deadline_s=10.0))
    read = reader.read(user_ids)
    for features in (
        feast.get_feature_service(service_name(checkpoint.checkpoint_id)),
        [f"{view}:folded", f"{view}:recent"],
    ):
        served = feast.get_online_features(features=features, entity_rows=entities).to_dict()
        assert served["user_id"] == user_ids
        pairs = zip(served["folded"], served["recent"], strict=True)
        data = [None if folded is None else RowBytes(folded=folded, recent=recent) for folded, recent in pairs]
        assert data == rows.get_rows(checkpoint.checkpoint_id, user_ids)
        caches, missing, _ = read_plainly(user_ids, data, fold)
        for each in (read, asyncio.run(reader.read_async(user_ids))):
            assert_same(each.caches, caches)
            assert each.missing == missing == {"nobody": "absent", "line\nbreak": "absent"}
    reader.close()
