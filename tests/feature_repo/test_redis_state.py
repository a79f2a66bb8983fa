"""What a server says of itself, asked of a real one, and what is made of each thing it could say."""

from __future__ import annotations

import logging
from typing import Any

import pytest
from msgspec.structs import replace

from feature_repo import redis_store
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_state import ServerState, server_state
from feature_repo.redis_store import RedisRows
from models.errors import StoreError
from tests.feature_repo.subjects import A, get, stamp, whole
from tests.redis_server import RedisServer

SOUND = {"aof_enabled": 1, "maxmemory": 0}


@pytest.fixture
def found(redis_url: str) -> ServerState:
    """What the tests' own server says, but that it keeps an append-only file."""
    state = server_state(RedisRows(RedisSettings(url=redis_url)).ask)
    return replace(state, info=state.info | SOUND)


def test_a_sound_server_has_no_fault(found: ServerState) -> None:
    assert list(found.faults()) == []
    assert abs(found.skew_s) < 1
    assert found.saves == ""


@pytest.mark.parametrize(
    ("info", "words", "refused"),
    [
        ({"redis_version": "6.0.16"}, "Redis 6.0.16 is too old; use 6.2 or newer", True),
        ({"redis_version": "5.9.0"}, "too old", True),
        ({"maxmemory_policy": "volatile-lru"}, "the server evicts (volatile-lru)", True),
        ({"aof_enabled": 0}, "nothing is kept on disk", False),
        ({"aof_last_write_status": "err"}, "aof_last_write_status is err", False),
        ({"rdb_last_bgsave_status": "err"}, "rdb_last_bgsave_status is err", False),
        ({"role": "slave"}, "is a replica", False),
        ({"maxmemory": 1}, "memory is nearly full", False),
    ],
)
def test_each_thing_that_is_wrong_is_one_fault(
    found: ServerState, info: dict[str, Any], words: str, refused: bool
) -> None:
    (fault,) = replace(found, info=found.info | info).faults()
    assert words in f"{fault.what}; {fault.remedy}"
    assert fault.refused == refused


@pytest.mark.parametrize("version", ["6.2.0", "7.0.15", "8.0.1", "10.0.0"])
def test_versions_are_numbers(found: ServerState, version: str) -> None:
    assert list(replace(found, info=found.info | {"redis_version": version}).faults()) == []


def test_a_clock_is_wrong_only_beyond_what_the_way_may_have_taken(found: ServerState) -> None:
    assert list(replace(found, skew_s=-9.0, spread_s=8.0).faults()) == []
    (fault,) = replace(found, skew_s=-9.0, spread_s=6.0).faults()
    assert "the server's clock is 9.0 s from this machine's" in fault.what


def test_a_writer_looks_before_it_writes_and_a_reader_does_not(
    redis_url: str, redis_server: RedisServer, found: ServerState, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = replace(found, info=found.info | {"redis_version": "6.0.16"})
    monkeypatch.setattr(redis_store, "server_state", lambda ask: old)
    rows = RedisRows(RedisSettings(url=redis_url))
    assert get(rows, "u") is None
    with pytest.raises(StoreError, match=r"127\.0\.0\.1:\d+: Redis 6\.0\.16 is too old; use 6\.2"):
        rows.put_rows(A, [whole("u", stamp(1))])
    with redis_server.client() as client:
        assert client.dbsize() == 0


def test_what_is_wrong_and_not_refused_is_said_once_to_a_writer(
    redis_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    rows = RedisRows(RedisSettings(url=redis_url))
    with caplog.at_level(logging.WARNING):
        rows.put_rows(A, [whole("u", stamp(1))])
        rows.put_rows(A, [whole("u", stamp(2))])
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "nothing is kept on disk: a restart would lose every row; set appendonly to yes" in caplog.text
