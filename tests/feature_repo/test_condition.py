"""What `vql doctor` knows of a store, shown on real stores in each bad state."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from feature_repo.condition import Condition, examine
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowStore
from models.errors import StoreError, UnavailableError
from tests.feature_repo.rows import put_all, small_rows
from tests.feature_repo.subjects import A, stamp, whole
from tests.redis_server import PERSISTENT, running_redis


def said(found: Condition) -> str:
    return "\n".join(f"{fault.what}; {fault.remedy}" for fault in found.faults)


def test_what_a_store_holds_is_told_and_nothing_is_written(store: RowStore, checkpoint, fold) -> None:
    put_all(store, checkpoint, small_rows(checkpoint, fold, 200))
    store.commit_positions(checkpoint.checkpoint_id, 1, {0: 41, 1: 7})
    found = examine(store, checkpoint.checkpoint_id)
    (held,) = found.checkpoints
    assert (held.checkpoint_id, held.rows) == (checkpoint.checkpoint_id, store.count_rows(checkpoint.checkpoint_id))
    assert held.positions == {0: (1, 41), 1: (1, 7)}
    assert held.backfill == store.backfill(checkpoint.checkpoint_id)
    assert {"kind", "version", "persistence"} <= found.facts.keys()
    assert "checkpoint" not in said(found)


def test_a_checkpoint_without_backfill_and_positions_or_without_rows_is_a_fault(store: RowStore) -> None:
    store.put_rows(A, [whole("u", stamp(1))])
    assert f"checkpoint {A} has neither a backfill nor positions" in said(examine(store))
    store.commit_positions(A, 0, {0: 1})
    assert "neither" not in said(examine(store))
    store.delete_user("u")
    assert f"checkpoint {A} has no rows; run vql backfill" in said(examine(store))
    assert "checkpoint " + "b" * 32 + " has no rows in this store" in said(examine(store, "b" * 32))


def test_an_embedded_store_that_is_not_there_is_not_made(tmp_path: Path) -> None:
    found = examine(SqliteRows(tmp_path / "online.db"))
    assert f"there is no store at {tmp_path / 'online.db'}; run vql backfill" in said(found)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_file_is_a_fault(tmp_path: Path) -> None:
    rows = SqliteRows(tmp_path / "online.db")
    rows.put_rows(A, [whole(f"u{n}", stamp(1)) for n in range(300)])
    rows.commit_positions(A, 0, {0: 1})
    rows.close()
    path = tmp_path / "online.db"
    data = bytearray(path.read_bytes())
    data[8192 : 8192 + 3000] = b"\xff" * 3000
    path.write_bytes(data)
    try:
        assert "is damaged" in said(examine(SqliteRows(path)))
    except StoreError as error:
        assert "it is damaged" in str(error)  # noqa: PT017 - either way it is said


@pytest.mark.parametrize(
    ("setting", "value", "wanted"),
    [
        ("maxmemory-policy", "allkeys-lru", "the server evicts (allkeys-lru)"),
        ("maxmemory", "2mb", "memory is nearly full"),
    ],
)
def test_a_server_set_up_to_lose_rows_is_a_fault(tmp_path: Path, setting: str, value: str, wanted: str) -> None:
    with running_redis(tmp_path, PERSISTENT) as server:
        rows = RedisRows(RedisSettings(url=server.url))
        rows.put_rows(A, [whole("u", stamp(1))])
        rows.commit_positions(A, 0, {0: 1})
        sound = examine(rows)
        assert sound.faults == []
        assert sound.facts["persistence"] == "append-only file"
        with server.client() as client:
            client.set("something else", b"x" * 2**21)
            client.config_set(setting, value)
        assert wanted in said(examine(rows))
        rows.close()


def test_an_emptied_server_without_persistence_and_with_a_wrong_clock_is_told_so(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        rows = RedisRows(RedisSettings(url=server.url))
        found = said(examine(rows, clock=lambda: time.time() - 60))
        assert "nothing is kept on disk" in found
        assert "the store has no generation" in found
        assert "the server's clock is 60" in found
        with server.client() as client:
            assert client.dbsize() == 0
        rows.close()


def test_a_server_that_is_away_is_an_error(tmp_path: Path) -> None:
    with running_redis(tmp_path) as server:
        rows = RedisRows(RedisSettings(url=server.url, timeout_s=0.5, retries=0))
        server.stop()
        with pytest.raises(UnavailableError):
            examine(rows)
