"""What every fenced store must do. A further store is one more entry of SUBJECTS.

The race is also run on Feast's own SQLite store, where it must fail: so it can fail.
"""

from __future__ import annotations

import multiprocessing
import random
import threading
from ast import literal_eval
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from feature_repo.store import Backfill, RowPut, RowStore
from models.row import RowBytes
from tests.feature_repo.subjects import A, B, SqliteSubject, bytes_of, get, partial, stamp, whole

RACED_USERS = [f"u{n}" for n in range(5)]
HOSTILE = ["nul\0inside", "\0", "line\nbreak", "quo'te\"s", "glob*?[a]", "100%_", "é", "🙂", "x" * 4096, "u", "U", "u "]
SUBJECTS = [SqliteSubject]


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, tmp_path: Path):
    return request.param(tmp_path)


@pytest.fixture
def store(subject) -> RowStore:
    return subject.open()


def test_a_new_row_comes_back_as_it_was_put(store):
    put = whole("u", stamp(3))
    assert store.put_rows(A, [put]) == [True]
    assert get(store, "u") == bytes_of(put)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (stamp(9), stamp(10)),
        (stamp(9), stamp(9, revision=1)),
        (stamp(2**40, revision=5), stamp(0, epoch=1)),
        (stamp(-1), stamp(0)),
        (stamp(2**47 - 1, epoch=2**32 - 2), stamp(0, epoch=2**32 - 1)),
    ],
)
def test_newer_replaces_older_and_never_the_other_way(store, older, newer):
    assert store.put_rows(A, [whole("u", older)]) == [True]
    assert store.put_rows(A, [whole("u", newer)]) == [True]
    assert store.put_rows(A, [whole("u", older)]) == [False]
    assert get(store, "u") == bytes_of(whole("u", newer))


def test_an_equal_stamp_changes_nothing(store):
    first = whole("u", stamp(3))
    store.put_rows(A, [first])
    other = RowPut(user_id="u", stamp=stamp(3), recent=b"other", folded_stamp=stamp(3), folded=b"other")
    assert store.put_rows(A, [other]) == [False]
    assert get(store, "u") == bytes_of(first)


def test_a_refused_put_does_not_hold_back_the_others_of_its_batch(store):
    store.put_rows(A, [whole("old", stamp(9))])
    batch = [whole("new", stamp(1)), whole("old", stamp(5)), whole("newer", stamp(2)), whole("new", stamp(1))]
    assert store.put_rows(A, batch) == [True, False, True, False]
    assert get(store, "old") == bytes_of(whole("old", stamp(9)))
    assert get(store, "newer") == bytes_of(whole("newer", stamp(2)))


def test_an_empty_batch_is_no_work(store):
    assert store.put_rows(A, []) == []
    assert store.get_rows(A, []) == []


def test_a_partial_put_keeps_the_folded_part(store):
    first = whole("u", stamp(5), folded=stamp(2))
    store.put_rows(A, [first])
    assert store.put_rows(A, [partial("u", stamp(6), folded=stamp(2))]) == [True]
    assert get(store, "u") == RowBytes(folded=first.folded, recent=b"new")


@pytest.mark.parametrize("folded", [stamp(1), stamp(3), stamp(2, epoch=1), stamp(2, revision=1)])
def test_a_partial_put_is_refused_unless_the_folded_part_is_the_one_it_read(store, folded):
    first = whole("u", stamp(5), folded=stamp(2))
    store.put_rows(A, [first])
    assert store.put_rows(A, [partial("u", stamp(6), folded=folded)]) == [False]
    assert get(store, "u") == bytes_of(first)


def test_a_partial_put_that_is_not_newer_is_refused(store):
    first = whole("u", stamp(5), folded=stamp(2))
    store.put_rows(A, [first])
    for at in (stamp(5), stamp(4)):
        assert store.put_rows(A, [partial("u", at, folded=stamp(2))]) == [False]
    assert get(store, "u") == bytes_of(first)


def test_a_partial_put_without_a_row_is_refused(store):
    assert store.put_rows(A, [partial("u", stamp(6), folded=stamp(2))]) == [False]
    assert get(store, "u") is None


def test_a_whole_put_after_partial_puts_moves_the_folded_part(store):
    store.put_rows(A, [whole("u", stamp(5), folded=stamp(2)), partial("u", stamp(6), folded=stamp(2))])
    assert store.put_rows(A, [whole("u", stamp(7), folded=stamp(6))]) == [True]
    assert store.put_rows(A, [partial("u", stamp(8), folded=stamp(2))]) == [False]
    assert store.put_rows(A, [partial("u", stamp(8), folded=stamp(6))]) == [True]


def test_checkpoints_do_not_see_each_other(store):
    store.put_rows(A, [whole("u", stamp(9))])
    assert get(store, "u", B) is None
    assert store.put_rows(B, [whole("u", stamp(1))]) == [True]
    assert get(store, "u", A) == bytes_of(whole("u", stamp(9)))


def test_a_thousand_users_come_back_in_the_order_asked_for_absent_ones_too(store):
    puts = [whole(f"u{n}", stamp(n)) for n in range(1000)]
    assert store.put_rows(A, puts) == [True] * 1000
    order = list(range(1200))
    random.Random(1).shuffle(order)
    rows = store.get_rows(A, [f"u{n}" for n in order])
    assert rows == [bytes_of(puts[n]) if n < 1000 else None for n in order]


def test_a_user_asked_for_twice_is_answered_twice(store):
    store.put_rows(A, [whole("u", stamp(1))])
    row = bytes_of(whole("u", stamp(1)))
    assert store.get_rows(A, ["u", "v", "u"]) == [row, None, row]


def test_hostile_user_ids_are_only_ids(store):
    for n, user_id in enumerate(HOSTILE):
        assert store.put_rows(A, [whole(user_id, stamp(n))]) == [True], user_id
    expected = [bytes_of(whole(user_id, stamp(n))) for n, user_id in enumerate(HOSTILE)]
    assert store.get_rows(A, HOSTILE) == expected
    assert store.delete_user("glob*?[a]") == 1
    assert store.get_rows(A, HOSTILE) == [
        None if u == "glob*?[a]" else e for u, e in zip(HOSTILE, expected, strict=True)
    ]


def test_a_deleted_user_is_gone_from_every_checkpoint_and_nobody_else_is(store):
    for checkpoint_id in (A, B):
        store.put_rows(checkpoint_id, [whole("u", stamp(1)), whole("v", stamp(1))])
    assert store.delete_user("u") == 2
    assert store.delete_user("u") == 0
    for checkpoint_id in (A, B):
        assert store.get_rows(checkpoint_id, ["u", "v"]) == [None, bytes_of(whole("v", stamp(1)))]


def test_a_deleted_user_can_begin_again_at_any_stamp(store):
    store.put_rows(A, [whole("u", stamp(9))])
    store.delete_user("u")
    assert store.put_rows(A, [partial("u", stamp(10), folded=stamp(9))]) == [False]
    assert store.put_rows(A, [whole("u", stamp(1))]) == [True]


def test_an_expired_row_is_absent_for_readers_and_for_the_fence(subject):
    store = subject.open(ttl_s=2)
    store.put_rows(A, [whole("u", stamp(9), folded=stamp(3))])
    subject.wait(1.0)
    assert get(store, "u") is not None
    subject.wait(1.5)
    assert get(store, "u") is None
    assert store.put_rows(A, [partial("u", stamp(10), folded=stamp(3))]) == [False]
    assert store.put_rows(A, [whole("u", stamp(1))]) == [True]
    assert get(store, "u") == bytes_of(whole("u", stamp(1)))


def test_every_write_starts_the_time_to_live_again(subject):
    store = subject.open(ttl_s=2)
    store.put_rows(A, [whole("u", stamp(1))])
    subject.wait(1.5)
    store.put_rows(A, [partial("u", stamp(2), folded=stamp(1))])
    subject.wait(1.5)
    assert get(store, "u") is not None


def test_without_a_time_to_live_rows_stay(subject):
    store = subject.open()
    store.put_rows(A, [whole("u", stamp(1))])
    subject.wait(3)
    assert get(store, "u") is not None


def test_positions_only_rise(store):
    assert store.positions(A) == {}
    store.commit_positions(A, 0, {0: 5, 3: 2**40})
    store.commit_positions(A, 0, {0: 4, 3: 2**40 + 1})
    assert store.positions(A) == {0: (0, 5), 3: (0, 2**40 + 1)}
    store.commit_positions(A, 1, {0: 1})
    store.commit_positions(A, 0, {0: 100, 7: 0})
    assert store.positions(A) == {0: (1, 1), 3: (0, 2**40 + 1), 7: (0, 0)}
    store.commit_positions(A, 1, {})
    assert store.positions(B) == {}


def test_the_backfill_record_comes_back_and_the_last_one_counts(store):
    assert store.backfill(A) is None
    first = Backfill(epoch=2, cut={0: 41, 11: 2**40}, users=3, events=7, log="kafka:events")
    second = Backfill(epoch=2, cut={}, users=0, events=0, log="delta")
    store.record_backfill(A, first)
    assert store.backfill(A) == first
    store.record_backfill(A, second)
    assert store.backfill(A) == second
    assert store.backfill(B) is None


def test_a_second_opening_sees_everything(subject):
    first, second = subject.open(), subject.open()
    first.put_rows(A, [whole("u", stamp(1))])
    first.commit_positions(A, 0, {0: 1})
    assert get(second, "u") == bytes_of(whole("u", stamp(1)))
    assert second.positions(A) == {0: (0, 1)}


def offers(seed: int) -> list[RowPut]:
    """500 contended puts in an order of the writer's own."""
    puts = [whole(user_id, stamp(5 * n + seed % 5)) for user_id in RACED_USERS for n in range(100)]
    random.Random(seed).shuffle(puts)
    return puts


NEWEST = max(put.stamp.order for seed in range(4) for put in offers(seed))


def offer_all(store: RowStore, seed: int) -> list[tuple[str, tuple[int, int, int]]]:
    """Put one at a time; which the store accepted."""
    return [(put.user_id, put.stamp.order) for put in offers(seed) if store.put_rows(A, [put])[0]]


def newest_marks() -> list[RowBytes]:
    return [bytes_of(whole("u", stamp(NEWEST[1])))] * len(RACED_USERS)


def accepted_once_each(accepted: list[list[tuple[str, tuple[int, int, int]]]]) -> bool:
    """No stamp of a user was accepted twice, and each writer's own accepted stamps rise."""
    every = [entry for part in accepted for entry in part]
    per_user = [[order for user, order in part if user == raced] for part in accepted for raced in RACED_USERS]
    return len(every) == len(set(every)) and all(orders == sorted(orders) for orders in per_user)


def race_threads(open_store: Callable[[], RowStore]) -> list[list[tuple[str, tuple[int, int, int]]]]:
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda seed: offer_all(open_store(), seed), range(4)))


def test_the_newest_row_wins_a_race_of_threads_on_one_store(store):
    assert accepted_once_each(race_threads(lambda: store))
    assert store.get_rows(A, RACED_USERS) == newest_marks()


@pytest.mark.slow
def test_the_newest_row_wins_a_race_of_processes(store):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        accepted = pool.starmap(offer_all, [(store, seed) for seed in range(4)], chunksize=1)
    assert accepted_once_each(accepted)
    assert store.get_rows(A, RACED_USERS) == newest_marks()


def test_a_reader_in_the_race_sees_whole_rows_that_never_go_back(store):
    done, seen = threading.Event(), []

    def watch() -> None:
        while not done.is_set():
            seen.append(store.get_rows(A, RACED_USERS))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        race_threads(lambda: store)
    finally:
        done.set()
        watcher.join()
    assert len(seen) > 10
    for user in range(len(RACED_USERS)):
        rows = [rows[user] for rows in seen if rows[user] is not None]
        assert all(row.folded == row.recent for row in rows)
        orders = [literal_eval(row.recent[: row.recent.index(b")") + 1].decode()) for row in rows]
        assert orders == sorted(orders)


def test_negative_control_an_older_row_wins_the_same_race_on_feasts_own_store(tmp_path):
    # Imported late: the processes of the race above import this file, and Feast takes seconds.
    from tests.feature_repo.stock_store import StockStore

    store = StockStore(tmp_path / "stock.db")
    accepted = race_threads(lambda: store)
    assert not accepted_once_each(accepted)
    rows = store.get_rows(A, RACED_USERS)
    assert None not in rows
    assert rows != newest_marks()
