"""What is Redis's own in its store: a server that loses what it held. What every store does is in the conformance."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from feature_repo import redis_store
from feature_repo.redis_answers import packed
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import CHECKPOINTS, RedisRows, _row_commands, row_key
from feature_repo.store import Backfill, RowStore
from models.errors import StoreError, UnavailableError
from tests.feature_repo.subjects import A, B, bytes_of, get, partial, stamp, whole
from tests.redis_server import MEMORY_ONLY, PERSISTENT, RedisServer, running_redis

RECORD = Backfill(epoch=0, cut={0: 1}, users=1, events=1, log="l")
READS: list[Callable[[RowStore], object]] = [lambda rows: get(rows, "u"), lambda rows: rows.count_rows(A)]
WRITES: list[Callable[[RowStore], object]] = [
    lambda rows: rows.put_rows(A, [whole("new", stamp(2), follows=stamp(-1))]),
    lambda rows: rows.put_rows(A, [whole("u", stamp(9))]),
    lambda rows: rows.commit_positions(A, 0, {0: 2}),
    lambda rows: rows.record_backfill(A, RECORD),
]


@pytest.fixture
def open_rows(redis_url: str) -> Callable[[], RedisRows]:
    return lambda: RedisRows(RedisSettings(url=redis_url))


def flush(server: RedisServer) -> None:
    with server.client() as client:
        client.flushall()


@pytest.mark.parametrize("call", [*READS, *WRITES])
def test_a_store_that_was_emptied_under_a_writer_is_refused_with_the_remedy(open_rows, redis_server, call):
    rows = open_rows()
    rows.put_rows(A, [whole("u", stamp(1))])
    flush(redis_server)
    with pytest.raises(StoreError, match="was emptied or replaced while in use; run vql backfill") as caught:
        call(rows)
    assert not isinstance(caught.value, UnavailableError)
    assert open_rows().positions(A) == {}
    assert open_rows().backfill(A) is None


def test_a_store_that_was_emptied_under_a_reader_is_not_taken_for_one_of_new_users(open_rows, redis_server):
    open_rows().put_rows(A, [whole("u", stamp(1))])
    reader = open_rows()
    assert get(reader, "u") is not None
    flush(redis_server)
    for _ in range(2):
        with pytest.raises(StoreError, match="was emptied or replaced"):
            get(reader, "u")


@pytest.mark.parametrize("call", [*READS, *WRITES])
def test_a_store_that_was_emptied_and_backfilled_again_is_another_until_it_is_opened_again(
    open_rows, redis_server, call
):
    rows = open_rows()
    rows.put_rows(A, [whole("u", stamp(5))])
    flush(redis_server)
    refilled = whole("u", stamp(3, revision=1))
    open_rows().put_rows(A, [refilled])
    with pytest.raises(StoreError, match="was emptied or replaced"):
        call(rows)
    rows.close()
    assert get(rows, "u") in (bytes_of(refilled), bytes_of(whole("u", stamp(9))))
    call(rows)


@pytest.mark.parametrize("call", WRITES)
def test_a_store_that_was_removed_under_a_writer_takes_nothing_more_from_it(open_rows, redis_server, call):
    rows = open_rows()
    rows.put_rows(A, [whole("u", stamp(1))])
    open_rows().remove()
    with pytest.raises(StoreError, match="was emptied or replaced"):
        call(rows)
    assert (open_rows().positions(A), open_rows().backfill(A)) == ({}, None)


def test_a_reader_that_found_the_store_empty_sees_what_is_written_later(open_rows):
    reader = open_rows()
    assert get(reader, "u") is None
    open_rows().put_rows(A, [whole("u", stamp(1))])
    assert get(reader, "u") == bytes_of(whole("u", stamp(1)))


@pytest.mark.parametrize("end", [RedisServer.stop, RedisServer.kill])
def test_a_server_that_kept_everything_over_a_restart_is_the_same_store(tmp_path, end):
    with running_redis(tmp_path, PERSISTENT) as server:
        rows = RedisRows(RedisSettings(url=server.url))
        rows.put_rows(A, [whole("u", stamp(1))])
        rows.commit_positions(A, 0, {0: 1})
        end(server)
        server.start()
        assert get(rows, "u") == bytes_of(whole("u", stamp(1)))
        assert rows.put_rows(A, [partial("u", stamp(2), follows=stamp(1))]) == [True]
        assert rows.positions(A) == {0: (0, 1)}


@pytest.mark.parametrize("call", [*READS, *WRITES])
def test_a_store_that_lost_its_last_writes_stops_the_writer_and_a_new_one_resumes(tmp_path: Path, call):
    with running_redis(tmp_path, MEMORY_ONLY) as server:
        rows = RedisRows(RedisSettings(url=server.url))
        rows.put_rows(A, [whole("u", stamp(1))])
        rows.commit_positions(A, 0, {0: 1})
        with server.client() as client:
            client.save()
        assert rows.put_rows(A, [partial("u", stamp(2), follows=stamp(1))]) == [True]
        server.kill()
        server.start()

        with pytest.raises(StoreError, match=r"went back to an earlier state.*start this program again") as caught:
            call(rows)

        assert not isinstance(caught.value, UnavailableError)
        restarted = RedisRows(RedisSettings(url=server.url))
        assert (restarted.positions(A), restarted.backfill(A)) == ({0: (0, 1)}, None)
        assert restarted.put_rows(A, [partial("u", stamp(2), follows=stamp(1))]) in ([True], [False])
        restarted.commit_positions(A, 0, {0: 2})
        assert restarted.positions(A) == {0: (0, 2)}


def test_a_store_that_lost_only_what_was_never_acknowledged_goes_on(tmp_path: Path):
    with running_redis(tmp_path, MEMORY_ONLY) as server:
        rows = RedisRows(RedisSettings(url=server.url, timeout_s=0.5, retries=0))
        rows.put_rows(A, [whole("u", stamp(1))])
        with server.client() as client:
            client.save()
        server.kill()
        with pytest.raises(UnavailableError):
            rows.put_rows(A, [whole("u", stamp(2))])
        server.start()
        assert get(rows, "u") == bytes_of(whole("u", stamp(1)))
        assert rows.put_rows(A, [whole("u", stamp(2))]) == [True]
        rows.commit_positions(A, 0, {0: 2})


def test_a_writer_that_only_asked_for_its_positions_notices_the_loss_too(tmp_path: Path):
    with running_redis(tmp_path, MEMORY_ONLY) as server:
        RedisRows(RedisSettings(url=server.url)).put_rows(A, [whole("u", stamp(1))])
        with server.client() as client:
            client.save()
        earlier = RedisRows(RedisSettings(url=server.url))
        earlier.put_rows(A, [whole("u", stamp(2))])
        earlier.commit_positions(A, 0, {0: 2})
        rows = RedisRows(RedisSettings(url=server.url))
        assert rows.positions(A) == {0: (0, 2)}
        server.kill()
        server.start()
        with pytest.raises(StoreError, match="went back"):
            get(rows, "u")


@pytest.mark.parametrize("policy", ["allkeys-lru", "volatile-ttl"])
def test_a_server_that_evicts_is_refused_for_writing(tmp_path, policy):
    with running_redis(tmp_path, (*MEMORY_ONLY, "--maxmemory-policy", policy)) as server:
        rows = RedisRows(RedisSettings(url=server.url))
        assert get(rows, "u") is None
        with pytest.raises(StoreError, match=rf"evicts \({policy}\).*set its maxmemory-policy to noeviction"):
            rows.put_rows(A, [whole("u", stamp(1))])


def test_puts_and_reads_beyond_one_round_trip_come_back_in_order(open_rows, monkeypatch):
    monkeypatch.setattr(redis_store, "BYTES_PER_PUT", 100_000)
    monkeypatch.setattr(redis_store, "USERS_PER_READ", 7)
    rows = open_rows()
    rows.put_rows(A, [whole(f"u{n}", stamp(5)) for n in range(0, 200, 3)])
    puts = [whole(f"u{n}", stamp(5)) for n in range(200)]
    assert rows.put_rows(A, puts) == [n % 3 != 0 for n in range(200)]
    assert rows.get_rows(A, [put.user_id for put in puts]) == [bytes_of(put) for put in puts]


def test_an_erased_user_and_a_removed_store_leave_no_key_behind(open_rows, redis_server):
    rows = open_rows()
    for checkpoint_id in (A, B):
        rows.put_rows(checkpoint_id, [whole("erased-user", stamp(1)), whole("v", stamp(1))])
    rows.commit_positions(A, 0, {0: 1})
    rows.record_backfill(A, RECORD)
    assert rows.delete_user("erased-user") == 2
    with redis_server.client() as client:
        assert list(client.scan_iter(b"*erased-user*")) == []
        members = [m for key in client.scan_iter(b"vql:*users:*") for m in client.zrange(key, 0, -1)]
        assert members == [b"v", b"v"]
        assert client.smembers(CHECKPOINTS) == {A.encode(), B.encode()}
        rows.remove()
        left = list(client.scan_iter())
        assert [key for key in left if b":tally:" not in key] == []
        assert all(0 < client.ttl(key) <= redis_store.TALLY_KEPT_S for key in left)


def test_the_index_forgets_the_expired_and_keeps_those_that_no_longer_expire(redis_url, redis_server):
    brief, lasting = (RedisRows(RedisSettings(url=redis_url, ttl_s=ttl_s)) for ttl_s in (0.2, None))
    brief.put_rows(A, [whole(f"u{n}", stamp(1)) for n in range(100)])
    assert lasting.put_rows(A, [partial("u0", stamp(2), follows=stamp(1))]) == [True]
    with redis_server.client() as client:
        while list(client.scan_iter(b"*:row:*:u[1-9]*")):
            time.sleep(0.01)
        assert (lasting.count_rows(A), get(lasting, "u0") is not None) == (1, True)
        brief.put_rows(A, [whole(f"v{n}", stamp(1)) for n in range(500)])
        users = {m for key in client.keys(b"vql:*users:*") for m in client.zrange(key, 0, -1)}
    assert users == {b"u0", *(b"v%d" % n for n in range(500))}


def test_an_expired_row_is_absent_to_a_reader_before_the_server_has_cleaned_up(tmp_path):
    with running_redis(tmp_path, (*MEMORY_ONLY, "--enable-debug-command", "yes")) as server:
        rows = RedisRows(RedisSettings(url=server.url, ttl_s=0.2))
        with server.client() as client:
            client.execute_command("DEBUG SET-ACTIVE-EXPIRE", 0)
            rows.put_rows(A, [whole("u", stamp(1))])
            held = client.dbsize()
            time.sleep(0.3)
            assert client.dbsize() == held
            assert (get(rows, "u"), rows.count_rows(A)) == (None, 0)


def test_the_commands_of_a_read_are_those_that_name_each_key_by_itself():
    user_ids = ["u", "", "a user", "ü" * 40, "x" * 1000, *map(str, range(50))]
    expected = [packed((b"HMGET", row_key(A, user_id), b"f", b"r")) for user_id in user_ids]
    assert _row_commands(A, user_ids) == expected
