"""A reader whose store is slow, away, or comes back empty: real servers, stopped and started."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Read, Reader, ReadLimits
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows, row_key
from models.attention import CacheBatch
from models.checkpoint import Checkpoint
from models.errors import StoreError, UnavailableError
from models.row import Fold
from tests.faults.proxy import Proxy, running_proxy
from tests.feature_repo.plain_reader import read_plainly
from tests.feature_repo.rows import put_all, small_rows
from tests.redis_server import RedisServer, running_redis

DEADLINE_S = 0.05
# The machine may be busy with other work: what is told apart is a deadline kept and a store waited for.
SLACK_S = 1.0


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    with running_redis(tmp_path) as running:
        yield running


@pytest.fixture
def proxy(server: RedisServer) -> Iterator[Proxy]:
    with running_proxy(server.port) as running:
        yield running


def filled(url: str, checkpoint: Checkpoint, fold: Fold) -> list[str]:
    rows = RedisRows(RedisSettings(url=url))
    stored = small_rows(checkpoint, fold, 400)
    put_all(rows, checkpoint, stored)
    rows.close()
    return list(stored)


def reader_of(url: str, tmp_path: Path, checkpoint: Checkpoint, **limits: float) -> Reader:
    chosen = ReadLimits(**{"deadline_s": DEADLINE_S} | limits)
    handle = StoreHandle(state=tmp_path, redis=RedisSettings(url=url)).for_reader(chosen.deadline_s)
    return Reader(handle.open(), Opened(checkpoint), chosen)


def timed(reader: Reader, user_ids: list[str]) -> tuple[Read, float]:
    started_s = time.monotonic()
    read = reader.read(user_ids)
    return read, time.monotonic() - started_s


def until_fresh(reader: Reader, user_ids: list[str], wait_s: float = 20.0) -> Read:
    """The first answer that is the store's own."""
    deadline_s = time.monotonic() + wait_s
    while True:
        read = reader.read(user_ids)
        if not read.missing and not read.stale:
            return read
        assert time.monotonic() < deadline_s, (read.missing, read.stale)
        time.sleep(0.02)


def refusal_of(reader: Reader, user_ids: list[str], wait_s: float = 20.0) -> StoreError:
    """What the reader says when it has reached a store that is lost; it is away until then."""
    deadline_s = time.monotonic() + wait_s
    while time.monotonic() < deadline_s:
        try:
            read = reader.read(user_ids)
        except StoreError as error:
            return error
        assert read.stale == dict.fromkeys(user_ids, "late")
    raise AssertionError("never refused")


def assert_same(a: CacheBatch, b: CacheBatch) -> None:
    for name in CacheBatch.__slots__:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def test_a_store_slower_than_the_deadline_leaves_users_late_and_then_stale(
    server: RedisServer, proxy: Proxy, tmp_path: Path, checkpoint: Checkpoint, fold: Fold
) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    proxy.late_s = (0.12, 0.12)
    reader = reader_of(proxy.url, tmp_path, checkpoint)

    first, seconds = timed(reader, user_ids)
    assert first.missing == dict.fromkeys(user_ids, "late")
    assert not first.caches.present_B.any()
    assert seconds < DEADLINE_S + SLACK_S

    # The answers that nobody waited for any more are kept.
    deadline_s = time.monotonic() + 20
    while (second := reader.read([*user_ids, "nobody"])).missing != {"nobody": "late"}:
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    assert second.stale == dict.fromkeys(user_ids, "late")
    stored = RedisRows(RedisSettings(url=server.url)).get_rows(checkpoint.checkpoint_id, [*user_ids, "nobody"])
    assert_same(second.caches, read_plainly([*user_ids, "nobody"], stored, fold)[0])
    in_a_loop = asyncio.run(reader.read_async([*user_ids, "nobody"]))
    assert (in_a_loop.missing, in_a_loop.stale) == (second.missing, second.stale)
    assert_same(in_a_loop.caches, second.caches)

    proxy.late_s = (0.0, 0.0)
    assert_same(until_fresh(reader, user_ids).caches, reader.read(user_ids).caches)
    counted = reader.metrics.registry.get_sample_value
    assert counted("vql_reader_users_total", {"outcome": "late"}) >= len(user_ids)
    assert counted("vql_reader_users_total", {"outcome": "stale_late"}) >= len(user_ids)
    assert counted("vql_reader_refused_total") == 0
    reader.close()


def test_a_deadline_in_the_middle_of_an_answer_is_kept_and_a_thread_takes_the_rest(
    server: RedisServer, proxy: Proxy, tmp_path: Path, checkpoint: Checkpoint, fold: Fold
) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    reader = reader_of(proxy.url, tmp_path, checkpoint, deadline_s=0.5)
    others, asked = user_ids[:2], user_ids[2:]
    until_fresh(reader, others)
    with server.client() as client:
        before = client.info("stats")["total_connections_received"]
        for pass_bytes in (1, 5, 700):
            proxy.held.clear()
            proxy.pass_bytes = pass_bytes
            late, seconds = timed(reader, asked)
            assert proxy.held.is_set()
            assert late.outcome(asked[0]) == ("late" if pass_bytes == 1 else "stale_late")
            assert 0.5 <= seconds < 0.5 + SLACK_S
            proxy.release()
            # What came of it is kept, and nothing of it is taken for another answer.
            deadline_s = time.monotonic() + 20
            while None in reader._kept.get(asked):
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            stored = RedisRows(RedisSettings(url=server.url)).get_rows(checkpoint.checkpoint_id, others)
            assert_same(until_fresh(reader, others).caches, read_plainly(others, stored, fold)[0])
        # A connection is not lost by a late answer: this test made three, and the reader one while the first was late.
        assert client.info("stats")["total_connections_received"] <= before + 3 + 1
    reader.close()


def test_a_connection_that_is_open_is_read_by_the_caller_itself(
    server: RedisServer, tmp_path: Path, checkpoint: Checkpoint, fold: Fold, monkeypatch: pytest.MonkeyPatch
) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    reader = reader_of(server.url, tmp_path, checkpoint, deadline_s=5.0)
    first = reader.read(user_ids)

    def refuse(fetching: object) -> None:
        raise AssertionError("a thread was asked")

    monkeypatch.setattr(reader, "_hand_over", refuse)
    for _ in range(reader.limits.waiting_max + 1):
        read = reader.read(user_ids)
        assert (read.missing, read.stale) == ({}, {})
        assert_same(read.caches, first.caches)
    with pytest.raises(AssertionError, match="a thread was asked"):
        asyncio.run(reader.read_async(user_ids))
    reader.close()


def test_threads_share_a_reader(server: RedisServer, tmp_path: Path, checkpoint: Checkpoint, fold: Fold) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    reader = reader_of(server.url, tmp_path, checkpoint, deadline_s=5.0)
    asked = [user_ids[n:] + user_ids[:n] for n in range(4)]
    expected = [reader.read(each).caches for each in asked]
    wrong: list[object] = []

    def load(n: int) -> None:
        try:
            for _ in range(100):
                assert_same(reader.read(asked[n]).caches, expected[n])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=load, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    reader.close()


def test_a_connection_on_which_an_answer_was_an_error_is_not_used_again(
    server: RedisServer, tmp_path: Path, checkpoint: Checkpoint, fold: Fold
) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    reader = reader_of(server.url, tmp_path, checkpoint, deadline_s=5.0)
    expected = reader.read(user_ids).caches
    key = row_key(checkpoint.checkpoint_id, "stranger")
    with server.client() as client:
        client.set(key, "no hash")
        for place in range(len(user_ids)):
            with pytest.raises(StoreError, match="wrong kind of value"):
                reader.read([*user_ids[:place], "stranger", *user_ids[place:]])
            assert_same(reader.read(user_ids).caches, expected)
    reader.close()


def test_more_calls_than_may_wait_are_late_at_once(
    server: RedisServer, proxy: Proxy, tmp_path: Path, checkpoint: Checkpoint, fold: Fold
) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    reader = reader_of(proxy.url, tmp_path, checkpoint, deadline_s=2.0, waiting_max=1)
    until_fresh(reader, user_ids)
    proxy.late_s = (0.5, 0.5)
    slow = threading.Thread(target=reader.read, args=(user_ids,))
    slow.start()
    time.sleep(0.1)
    read, seconds = timed(reader, user_ids)
    assert read.stale == dict.fromkeys(user_ids, "late")
    assert seconds < 0.35
    slow.join()
    reader.close()


def test_what_was_read_last_is_good_for_a_while_only(
    server: RedisServer, tmp_path: Path, checkpoint: Checkpoint, fold: Fold
) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    reader = reader_of(server.url, tmp_path, checkpoint, kept_s=0.5)
    until_fresh(reader, user_ids)
    server.stop()
    assert reader.read(user_ids).stale == dict.fromkeys(user_ids, "late")
    time.sleep(0.6)
    assert reader.read(user_ids).missing == dict.fromkeys(user_ids, "late")
    reader.close()


def test_without_a_deadline_a_store_that_is_away_is_an_error(
    server: RedisServer, checkpoint: Checkpoint, fold: Fold
) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    rows = RedisRows(RedisSettings(url=server.url, timeout_s=0.5, retries=0))
    reader = Reader(rows, Opened(checkpoint))
    assert reader.read(user_ids).missing == {}
    server.stop()
    with pytest.raises(UnavailableError, match="does not answer"):
        reader.read(user_ids)
    with pytest.raises(UnavailableError, match="does not answer"):
        asyncio.run(reader.read_async(user_ids))
    reader.close()


def test_a_server_stopped_under_load_is_answered_for_and_one_that_comes_back_empty_is_refused_until_it_is_filled(
    server: RedisServer, tmp_path: Path, checkpoint: Checkpoint, fold: Fold
) -> None:
    user_ids = filled(server.url, checkpoint, fold)
    reader = reader_of(server.url, tmp_path, checkpoint, deadline_s=0.25)
    expected = until_fresh(reader, user_ids).caches
    answers: list[tuple[Read, float]] = []
    errors: list[Exception] = []
    ended = threading.Event()

    def load() -> None:
        while not ended.is_set():
            try:
                answers.append(timed(reader, user_ids))
            except Exception as error:
                errors.append(error)
                return

    threads = [threading.Thread(target=load) for _ in range(3)]
    for thread in threads:
        thread.start()
    time.sleep(0.3)
    server.kill()
    time.sleep(1.0)
    ended.set()
    for thread in threads:
        thread.join()

    assert errors == []
    assert any(not read.stale for read, _ in answers)
    assert answers[-1][0].stale == dict.fromkeys(user_ids, "late")
    assert all(read.missing == {} for read, _ in answers)
    assert max(seconds for _, seconds in answers) < 0.25 + SLACK_S
    for read, _ in answers[:: max(1, len(answers) // 50)]:
        assert_same(read.caches, expected)

    server.start()
    assert "was emptied or replaced while in use" in str(refusal_of(reader, user_ids))
    for _ in range(3):
        with pytest.raises(StoreError, match="run vql backfill"):
            reader.read(user_ids)
    with pytest.raises(StoreError, match="run vql backfill"):
        asyncio.run(reader.read_async(user_ids))

    filled(server.url, checkpoint, fold)
    assert_same(until_fresh(reader, user_ids).caches, expected)
    reader.close()
