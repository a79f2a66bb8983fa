"""Many writers on the same users, against every store: the newest row wins, and a chain of writers loses no link.

The race is also run on Feast's own SQLite store, where it must fail: so it can fail.
"""

from __future__ import annotations

import multiprocessing
import random
import threading
from ast import literal_eval
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from feature_repo.store import RowPut, RowStore
from models.row import RowBytes
from tests.feature_repo.subjects import A, bytes_of, get, stamp, whole

RACED_USERS = [f"u{n}" for n in range(5)]


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


def extend(store: RowStore, writer: int, links: int) -> list[int]:
    """Add links to the one chain that is u's row: each continues the row that was read. The links' numbers."""
    made: list[int] = []
    while len(made) < links:
        stored = get(store, "u")
        chain = [] if stored is None else literal_eval(stored.recent.decode())
        at = len(chain)
        row = repr([*chain, writer]).encode()
        put = RowPut(user_id="u", stamp=stamp(at), recent=row, folded=row, follows=stamp(at - 1))
        if store.put_rows(A, [put])[0]:
            made.append(at)
    return made


@pytest.mark.parametrize("writers", [2, 16])
def test_writers_that_continue_what_they_read_lose_no_link(store, writers):
    with ThreadPoolExecutor(writers) as pool:
        made = list(pool.map(lambda n: extend(store, n, 10), range(writers)))
    chain = literal_eval(get(store, "u").recent.decode())
    assert len(chain) == 10 * writers
    assert all([chain[at] for at in links] == [writer] * 10 for writer, links in enumerate(made))


@pytest.mark.slow
def test_processes_that_continue_what_they_read_lose_no_link(store):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        made = pool.starmap(extend, [(store, n, 25) for n in range(4)], chunksize=1)
    chain = literal_eval(get(store, "u").recent.decode())
    assert sorted(at for links in made for at in links) == list(range(100))
    assert [chain.count(writer) for writer in range(4)] == [25] * 4
