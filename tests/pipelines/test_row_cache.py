"""The worker's own rows: what is kept, what goes first, and that a stale one does no harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from feature_repo.sqlite_store import SqliteRows
from models.checkpoint import Checkpoint
from models.row import RowBytes, new_row
from pipelines.row_cache import RowCache
from pipelines.update import update_rows
from tests.pipelines.small_log import assert_rows_equal, plain_rows, read_rows
from tests.pipelines.test_update import USERS, batch
from tests.small import random_events, small_checkpoint

MB = 1 << 20


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "c")


class CountsReads(SqliteRows):
    """Remembers who was asked for."""

    asked: tuple[str, ...] = ()

    def get_rows(self, checkpoint_id: str, user_ids: list[str]) -> list[RowBytes | None]:
        self.asked += tuple(user_ids)
        return super().get_rows(checkpoint_id, user_ids)


def test_the_least_recently_used_rows_go_first_and_the_bytes_stay_bounded(checkpoint: Checkpoint) -> None:
    row = replace(new_row(checkpoint.spec, 1, 0), recent_data=bytes(9_000))
    cache = RowCache(100_000)
    for n in range(50):
        cache.keep([f"u{n}"], [row])
        cache.get(["u0"])
        assert cache.size_bytes <= 100_000
    held = [n for n in range(50) if cache.get([f"u{n}"]) != [None]]
    assert held[0] == 0
    assert held[1:] == list(range(51 - len(held), 50))


def test_a_row_larger_than_the_cache_is_not_kept_nor_its_older_self(checkpoint: Checkpoint) -> None:
    row, cache = new_row(checkpoint.spec, 1, 0), RowCache(10_000)
    cache.keep(["u"], [row])
    assert cache.get(["u"]) == [row]
    cache.keep(["u"], [replace(row, recent_data=bytes(24_000))])
    assert cache.get(["u"]) == [None]


def test_a_user_who_comes_again_is_not_read_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    events, rows, cache = random_events(400), CountsReads(tmp_path / "rows.db"), RowCache(MB)

    first = update_rows(rows, checkpoint.fold(), batch(checkpoint, events[:300]), cache)
    second = update_rows(rows, checkpoint.fold(), batch(checkpoint, events[300:], 300), cache)

    assert sorted(rows.asked) == USERS
    assert (first.cache_hits, first.cache_misses) == (0, 7)
    assert (second.cache_hits, second.cache_misses) == (7, 0)
    assert_rows_equal(read_rows(rows, checkpoint, USERS), plain_rows(checkpoint, events, partitions=1))


def test_a_row_that_another_writer_overtook_is_read_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    events, rows, cache = random_events(400), SqliteRows(tmp_path / "rows.db"), RowCache(MB)
    update_rows(rows, checkpoint.fold(), batch(checkpoint, events[:100]), cache)
    update_rows(SqliteRows(rows.path), checkpoint.fold(), batch(checkpoint, events[100:250], 100))

    counts = update_rows(rows, checkpoint.fold(), batch(checkpoint, events[200:], 200), cache)

    assert counts.conflicts == len({event.user_id for event in events[200:]})
    assert (counts.events_folded, counts.events_skipped) == (150, 50)
    assert_rows_equal(read_rows(rows, checkpoint, USERS), plain_rows(checkpoint, events, partitions=1))


def test_a_user_erased_behind_the_cache_does_not_come_back(checkpoint: Checkpoint, tmp_path: Path) -> None:
    events, rows, cache = random_events(200), SqliteRows(tmp_path / "rows.db"), RowCache(MB)
    update_rows(rows, checkpoint.fold(), batch(checkpoint, events[:100]), cache)
    rows.delete_user("u0")

    update_rows(rows, checkpoint.fold(), batch(checkpoint, events[100:], 100), cache)

    after = [event for event in events[100:] if event.user_id == "u0"]
    assert read_rows(rows, checkpoint, ["u0"])["u0"].count == len(after)
