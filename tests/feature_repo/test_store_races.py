"""Many writers on the same users, against every store: the newest row wins, and a chain of writers loses no link.

The race is also run on Feast's own stores, and without the fence: so it can fail.
"""

from __future__ import annotations

import multiprocessing
from ast import literal_eval
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.pool import Pool
from typing import Any

import pytest

from feature_repo import redis_store
from feature_repo.redis_scripts import PUT_ROWS, SCRIPTS, Script
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from feature_repo.store import RowPut, RowStore
from tests.feature_repo import race
from tests.feature_repo.race import Outcome
from tests.feature_repo.subjects import A, get, stamp

EVERY_STEP = race.PUTS // race.PUTS_PER_STEP


def race_threads(store: Any, writers: int, puts: int = race.PUTS) -> list[Outcome]:
    with ThreadPoolExecutor(writers) as pool:
        return list(pool.map(lambda writer: race.run(store, writer, writers, puts), range(writers)))


def processes(count: int) -> Pool:
    """Processes that share nothing with this one, and import what they need once for all of them."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.feature_repo.race", "feature_repo.redis_store", "feature_repo.sqlite_store"])
    return context.Pool(count)


def require_that_the_newest_won(store: RowStore, outcomes: list[Outcome]) -> None:
    assert sum(outcome.overwritten for outcome in outcomes) == 0
    assert sum(outcome.torn for outcome in outcomes) == 0
    rows = store.get_rows(A, race.USERS)
    assert [race.offset_of(row) for row in rows] == race.newest_offsets(len(outcomes))
    # No offset of a user was taken twice, and enough were for the writers to have met.
    accepted = [each for outcome in outcomes for each in outcome.accepted]
    assert len(accepted) == len(set(accepted)) > EVERY_STEP // len(outcomes)


@pytest.mark.parametrize("writers", [2, 4, 16])
def test_the_newest_row_wins_a_race_of_threads(store, writers):
    require_that_the_newest_won(store, race_threads(store, writers))


@pytest.mark.slow
@pytest.mark.parametrize("writers", [2, 16])
def test_the_newest_row_wins_a_race_of_processes(store, writers):
    with processes(writers) as pool:
        outcomes = pool.starmap(race.run, [(store, writer, writers) for writer in range(writers)], chunksize=1)
    require_that_the_newest_won(store, outcomes)


@pytest.mark.parametrize("kind", ["sqlite", "redis"])
def test_negative_control_older_rows_win_the_same_race_on_feasts_own_stores(tmp_path, request, kind):
    # Imported late: Feast takes seconds.
    from tests.feature_repo.stock_store import stock_redis, stock_sqlite

    if kind == "sqlite":
        stock = stock_sqlite(tmp_path)
    else:
        request.getfixturevalue("redis_url")
        stock = stock_redis(tmp_path, request.getfixturevalue("redis_server").port)
    assert sum(outcome.overwritten for outcome in race_threads(stock, 4, puts=race.PUTS // 10)) > 0


def test_negative_control_the_race_notices_a_fence_that_does_not_compare(redis_url, monkeypatch):
    fence = "if follows_it and newer then"
    assert PUT_ROWS.text.count(fence) == 1
    careless = Script(PUT_ROWS.text.replace(fence, "if true then"))
    monkeypatch.setattr(redis_store, "PUT_ROWS", careless)
    monkeypatch.setattr(redis_store, "SCRIPTS", [*SCRIPTS, careless])
    rows = RedisRows(RedisSettings(url=redis_url))
    assert sum(outcome.overwritten for outcome in race_threads(rows, 4, puts=race.PUTS // 10)) > 0


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
    with processes(4) as pool:
        made = pool.starmap(extend, [(store, n, 25) for n in range(4)], chunksize=1)
    chain = literal_eval(get(store, "u").recent.decode())
    assert sorted(at for links in made for at in links) == list(range(100))
    assert [chain.count(writer) for writer in range(4)] == [25] * 4
