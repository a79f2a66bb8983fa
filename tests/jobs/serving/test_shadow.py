"""The shadow is asked afterwards, compared with the live one, and delays nothing."""

from __future__ import annotations

import re
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from prometheus_client import CollectorRegistry
from scipy.stats import spearmanr

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.releases.states import State, promoted, retired, stepped
from jobs.releases.table import record
from jobs.scoring import Asked, Scorer, load_scorer
from jobs.serving.batches import Ranked
from jobs.serving.metrics import CORRELATIONS, ServeMetrics
from jobs.serving.shadow import WAITING_MAX, Shadow, ShadowPlan, rank_correlation
from models.checkpoint import Checkpoint, open_checkpoint
from tests.jobs.releases.way import take_live, take_to_backfilled, take_to_shadow
from tests.jobs.serving.processes import load, serving, wait_until
from tests.jobs.serving.shop import CANDIDATES, NOW_MS, bodies, put_rows, user_ids
from tests.small_ranker import scoring_checkpoint


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Checkpoint, Checkpoint]:
    return scoring_checkpoint(tmp_path / "first", 5), scoring_checkpoint(tmp_path / "second", 6)


@pytest.fixture
def store(tmp_path: Path, pair: tuple[Checkpoint, Checkpoint]) -> StoreHandle:
    (tmp_path / "state").mkdir()
    store = StoreHandle(state=tmp_path / "state", redis=None)
    for each in pair:
        put_rows(each, store.open())
    return store


@pytest.fixture
def scorer_of(store: StoreHandle):
    def scorer(path: Path) -> Scorer:
        checkpoint = open_checkpoint(path)
        return load_scorer(checkpoint, checkpoint.fold(), Reader(store.open(), Opened(checkpoint)))

    return scorer


def answered(scorer: Scorer, user_id: str) -> tuple[list[Asked], Ranked]:
    """A request as the server answers it."""
    asked = [Asked(user_id=user_id, item_ids=CANDIDATES, now_ms=NOW_MS)]
    scores = scorer.score(asked)
    ranked = Ranked(
        checkpoint_id=scores.checkpoint_id, users=scores.users, wait_s=0, read_s=0, score_s=0, batch_users=1
    )
    return asked, ranked


def value(metrics: ServeMetrics, name: str, **labels: str) -> float:
    registry: CollectorRegistry = metrics.registry
    return registry.get_sample_value(name, labels) or 0.0


@pytest.mark.parametrize("levels", [3, 1000])
def test_the_correlation_is_spearmans(levels: int) -> None:
    rng = np.random.default_rng(levels)
    for _ in range(20):
        first, second = rng.integers(0, levels, (2, 50)) / 7
        assert rank_correlation(first, second) == pytest.approx(spearmanr(first, second).statistic)
    assert rank_correlation([1.0, 2.0, 3.0], [-1.0, -2.0, -3.0]) == -1
    assert rank_correlation([1.0, 1.0], [1.0, 2.0]) == 0


def test_it_is_asked_what_was_asked_and_compared(pair, scorer_of) -> None:
    first, second = pair
    metrics = ServeMetrics()
    shadow = Shadow(ShadowPlan(path=second.path, share=1.0), scorer_of, metrics)
    live, other = scorer_of(first.path), scorer_of(second.path)
    wanted = []
    for user_id in [*user_ids(), "nobody"]:
        asked, ranked = answered(live, user_id)
        wanted.append(spearmanr(ranked.users[0].scores, other.score(asked).users[0].scores).statistic)
        shadow.offer(asked, ranked)
    wait_until(lambda: value(metrics, "vql_shadow_requests_total", outcome="scored") == len(wanted))
    shadow.close()
    found = [value(metrics, "vql_shadow_rank_correlation_bucket", le=str(bound)) for bound in CORRELATIONS]
    assert found == [sum(one <= bound for one in wanted) for bound in CORRELATIONS]
    assert len(set(found)) > 1
    assert (
        value(metrics, "vql_shadow_rank_correlation_count") == value(metrics, "vql_shadow_seconds_count") == len(wanted)
    )
    assert value(metrics, "vql_shadow_users_total", history="fresh") == len(user_ids())
    assert value(metrics, "vql_shadow_users_total", history="absent") == 1
    assert not shadow._thread.is_alive()


def test_what_does_not_fit_is_dropped_and_nobody_waits(pair, scorer_of) -> None:
    first, second = pair
    metrics, go_on = ServeMetrics(), threading.Event()

    def late(path: Path) -> Scorer:
        go_on.wait(60)
        return scorer_of(path)

    shadow = Shadow(ShadowPlan(path=second.path, share=1.0), late, metrics)
    asked, ranked = answered(scorer_of(first.path), "u1")
    for _ in range(WAITING_MAX + 30):
        shadow.offer(asked, ranked)
    assert value(metrics, "vql_shadow_requests_total", outcome="dropped") == 30
    go_on.set()
    wait_until(lambda: value(metrics, "vql_shadow_requests_total", outcome="scored") == WAITING_MAX)
    shadow.close()


def test_a_share_of_the_users_is_asked_always_the_same_ones(pair, scorer_of) -> None:
    metrics = ServeMetrics()
    live = scorer_of(pair[0].path)
    _, ranked = answered(live, "u1")
    shadow = Shadow(ShadowPlan(path=pair[1].path, share=0.25), scorer_of, metrics)
    for n in range(400):
        shadow.offer([Asked(user_id=f"user{n % 200}", item_ids=CANDIDATES, now_ms=NOW_MS)], ranked)
        if n % 20 == 0:
            time.sleep(0.01)
    wait_until(lambda: shadow._queue.empty())
    shadow.close()
    taken = sum(value(metrics, "vql_shadow_requests_total", outcome=o) for o in ("scored", "dropped"))
    assert 50 < taken < 150
    assert taken % 2 == 0


def test_it_follows_what_is_in_shadow_and_asks_nothing_where_nothing_is(pair, scorer_of, tmp_path: Path) -> None:
    first, second = pair
    table = tmp_path / "releases"
    metrics = ServeMetrics()
    take_live(table, first.checkpoint_id, first.path)
    take_to_backfilled(table, second.checkpoint_id, second.path)
    shadow = Shadow(ShadowPlan(path=table, share=1.0), scorer_of, metrics)
    asked, ranked = answered(scorer_of(first.path), "u1")

    def scored() -> float:
        shadow.offer(asked, ranked)
        return value(metrics, "vql_shadow_requests_total", outcome="scored")

    wait_until(lambda: "is shadow" in shadow._problem)
    assert [scored() for _ in range(20)] == [0] * 20
    record(table, lambda now: stepped(now, second.checkpoint_id, State.SHADOW))
    wait_until(lambda: scored() > 0)
    record(table, lambda now: promoted(now, second.checkpoint_id))
    wait_until(lambda: "is shadow" in shadow._problem)
    wait_until(lambda: shadow._queue.empty())
    before = scored()
    for _ in range(20):
        scored()
    wait_until(lambda: shadow._queue.empty())
    time.sleep(0.2)
    assert value(metrics, "vql_shadow_requests_total", outcome="scored") == before
    record(table, lambda now: retired(now, first.checkpoint_id))
    shadow.close()


def test_a_shadow_that_fails_is_counted_and_asked_again(pair, scorer_of, store: StoreHandle) -> None:
    first, second = pair
    metrics = ServeMetrics()
    shadow = Shadow(ShadowPlan(path=second.path, share=1.0), scorer_of, metrics)
    asked, ranked = answered(scorer_of(first.path), "u1")
    # Two users, and the answer of one.
    shadow.offer([*asked, *asked], ranked)
    shadow.offer(asked, ranked)
    wait_until(lambda: value(metrics, "vql_shadow_requests_total", outcome="scored") == 1)
    assert value(metrics, "vql_shadow_requests_total", outcome="failed") == 1
    shadow.close()


@pytest.mark.slow
def test_the_worker_answers_by_the_live_one_and_measures_the_other(pair, store: StoreHandle, tmp_path: Path) -> None:
    first, second = pair
    table = tmp_path / "releases"
    take_live(table, first.checkpoint_id, first.path)
    take_to_shadow(table, second.checkpoint_id, second.path)
    with (
        serving(table, store.state, "--shadow", table, "--shadow-share", "1") as server,
        load(server, bodies(), clients=2) as seen,
    ):
        wait_until(lambda: 'vql_shadow_requests_total{outcome="scored"}' in server.get("/metrics")[1])
        answers = len(seen.answers)
        wait_until(lambda: len(seen.answers) > answers + 100)
        metrics = server.get("/metrics")[1]
        assert re.search(r"^vql_shadow_rank_correlation_count [1-9]", metrics, re.MULTILINE)
        # The reader of the live one alone is counted as such.
        read = float(re.search(r'^vql_reader_users_total\{outcome="fresh"\} (\S+)', metrics, re.MULTILINE)[1])
        assert read <= len(seen.answers) + 2
        server.process.terminate()
        assert server.process.wait(30) == 0
    assert (seen.statuses.keys(), seen.lost) == ({200}, [])
    assert {answer["checkpoint_id"] for _, answer in seen.answers} == {first.checkpoint_id}
