"""The process under load: steady memory, a store that goes away, a checkpoint that is swapped, and its end.

The steady load lasts VQL_LOAD_S seconds (default 5). The long version:
`VQL_LOAD_S=300 pytest tests/jobs/serving/test_server.py -k memory`.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.redis_settings import RedisSettings
from jobs.scoring import Asked, load_scorer
from models.checkpoint import Checkpoint
from tests.jobs.commands import assert_one_line
from tests.jobs.serving.processes import Server, load, serving, wait_until
from tests.jobs.serving.shop import CANDIDATES, NOW_MS, bodies, put_rows, user_ids
from tests.redis_server import running_redis
from tests.small_ranker import scoring_checkpoint

pytestmark = pytest.mark.slow

LOAD_S = float(os.environ.get("VQL_LOAD_S", "5"))
GROWTH_MB_MAX = 15.0


@pytest.fixture
def state(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    return tmp_path / "state"


def embedded(state: Path, *checkpoints: Checkpoint) -> None:
    rows = StoreHandle(state=state, redis=None).open()
    for checkpoint in checkpoints:
        put_rows(checkpoint, rows)
    rows.close()


def wanted_scores(checkpoint: Checkpoint, state: Path) -> dict[str, list[float]]:
    """By user, in this process."""
    fold = checkpoint.fold()
    scorer = load_scorer(checkpoint, fold, Reader(StoreHandle(state=state, redis=None).open(), Opened(checkpoint)))
    asked = [Asked(user_id=user_id, item_ids=CANDIDATES, now_ms=NOW_MS) for user_id in user_ids()]
    return {one.user_id: scored.scores for one, scored in zip(asked, scorer.score(asked).users, strict=True)}


def test_under_steady_load_every_request_is_answered_and_memory_stays_flat(server: Server, capsys) -> None:
    with load(server, bodies()):
        time.sleep(LOAD_S / 2)
    before_mb = server.rss_mb()
    with load(server, bodies()) as seen:
        time.sleep(LOAD_S)
    grown_mb = server.rss_mb() - before_mb
    p50_ms, p99_ms = np.percentile(np.array(seen.seconds) * 1000, [50, 99])
    with capsys.disabled():
        print(
            f"\n8 clients for {LOAD_S:g} s: {len(seen.answers) / LOAD_S:,.0f} requests/s, p50 {p50_ms:.1f} ms, "
            f"p99 {p99_ms:.1f} ms, memory {before_mb:.0f} MiB {grown_mb:+.1f}"
        )
    assert (seen.statuses.keys(), seen.lost) == ({200}, [])
    assert grown_mb < GROWTH_MB_MAX


def test_while_redis_is_away_answers_go_on_flagged(tmp_path: Path, state: Path) -> None:
    checkpoint = scoring_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis", ("--save", "", "--appendonly", "yes", "--appendfsync", "always")) as redis:
        rows = StoreHandle(state=state, redis=RedisSettings(url=redis.url)).open()
        put_rows(checkpoint, rows)
        rows.close()
        with serving(checkpoint.path, state, redis_url=redis.url) as server, load(server, bodies()) as seen:
            wait_until(lambda: len(seen.answers) > 50)
            killed = len(seen.answers)
            redis.kill()
            wait_until(lambda: len(seen.answers) > killed + 200)
            assert server.get("/healthz")[0] == 200
            redis.start()
            restarted = len(seen.answers)
            wait_until(lambda: histories(seen.answers[restarted:])["fresh"] > 50)
    assert (seen.statuses.keys(), seen.lost) == ({200}, [])
    assert histories(seen.answers[:killed]).keys() == {"fresh"}
    found = histories(seen.answers[killed:restarted])
    assert found["stale_late"] > 100
    assert found.keys() <= {"stale_late", "late", "fresh"}
    assert [line["event"][:24] for line in server.lines()].count("the online store is late") == 1
    assert not any(line["level"] == "error" for line in server.lines())


def test_a_store_that_was_emptied_is_refused_and_a_restart_is_asked_for(tmp_path: Path, state: Path) -> None:
    checkpoint = scoring_checkpoint(tmp_path / "checkpoint")
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis") as redis:
        rows = StoreHandle(state=state, redis=RedisSettings(url=redis.url)).open()
        put_rows(checkpoint, rows)
        rows.close()
        # A deadline that no machine misses: else the row that was read last would be served in the meantime.
        with serving(checkpoint.path, state, "--deadline-ms", "10000", redis_url=redis.url) as server:
            assert server.post(bodies()[0])[0] == 200
            with redis.client() as client:
                client.flushall()
            status, answer = server.post(bodies()[0])
            assert status == 503
            assert "was emptied or replaced while in use; run vql backfill" in answer["error"]
            assert server.get("/healthz")[0] == 503


def test_a_signal_under_load_loses_no_request(tmp_path: Path, state: Path) -> None:
    checkpoint = scoring_checkpoint(tmp_path / "checkpoint")
    embedded(state, checkpoint)
    with serving(checkpoint.path, state, "--linger", "1") as server, load(server, bodies()) as seen:
        wait_until(lambda: len(seen.answers) > 100)
        server.process.send_signal(signal.SIGTERM)
        sent = len(seen.answers)
        assert server.process.wait(30) == 0
    assert (seen.statuses.keys(), seen.lost) == ({200}, [])
    assert len(seen.answers) > sent
    assert server.lines()[-1]["event"] == "server ended"


def test_a_checkpoint_swapped_under_load_answers_each_request_alone(tmp_path: Path, state: Path) -> None:
    first, second = (scoring_checkpoint(tmp_path / name, seed) for name, seed in (("first", 5), ("second", 6)))
    embedded(state, first, second)
    wanted = {each.checkpoint_id: wanted_scores(each, state) for each in (first, second)}
    live = tmp_path / "live"
    live.symlink_to(first.path)
    with serving(live, state) as server, load(server, bodies()) as seen:
        for target in (second, first, second):
            point(live, target.path)
            wait_until(
                lambda target=target: seen.answers and seen.answers[-1][1]["checkpoint_id"] == target.checkpoint_id
            )
        settled = len(seen.answers)
        wait_until(lambda: len(seen.answers) > settled + 100)
    assert (seen.statuses.keys(), seen.lost) == ({200}, [])
    assert Counter(answer["checkpoint_id"] for _, answer in seen.answers).keys() == wanted.keys()
    for _, answer in seen.answers:
        (user,) = answer["users"]
        assert user["history"] == "fresh"
        assert user["scores"] == pytest.approx(wanted[answer["checkpoint_id"]][user["user_id"]], abs=1e-5)
    some = user_ids()[0]
    assert wanted[first.checkpoint_id][some] != pytest.approx(wanted[second.checkpoint_id][some], abs=1e-2)


def test_a_file_can_name_the_live_checkpoint_and_what_cannot_be_used_is_not_swapped_in(
    tmp_path: Path, state: Path
) -> None:
    first, second = (scoring_checkpoint(tmp_path / name, seed) for name, seed in (("first", 5), ("second", 6)))
    embedded(state, first)
    live = tmp_path / "live"
    live.write_text("first\n")
    with serving(live, state) as server:
        live.write_text("nowhere\n")
        wait_until(lambda: "no directory" in (json.loads(server.get("/readyz")[1])["checkpoint_problem"] or ""))
        live.write_text("second\n")
        wait_until(lambda: "run vql backfill" in (json.loads(server.get("/readyz")[1])["checkpoint_problem"] or ""))
        assert server.rank({"u0": ["i1"]}, NOW_MS)["checkpoint_id"] == first.checkpoint_id
        assert "vql_rank_checkpoint_unusable 1.0" in server.get("/metrics")[1]
        embedded(state, second)
        wait_until(lambda: server.rank({"u0": ["i1"]}, NOW_MS)["checkpoint_id"] == second.checkpoint_id)
        assert "vql_rank_checkpoint_unusable 0.0" in server.get("/metrics")[1]


def test_an_address_in_use_and_a_missing_checkpoint_are_one_line(vql, server: Server, serving_folder: Path) -> None:
    where = ("--state", serving_folder / "state")
    said = vql("serve", "--checkpoint", serving_folder / "checkpoint", *where, "--port", server.port)
    assert_one_line(said, 2, f"cannot listen at 127.0.0.1:{server.port}", "name a free port, or 0")
    said = vql("serve", "--checkpoint", serving_folder / "nothing", *where)
    assert_one_line(said, 3, "nothing", "is neither a checkpoint nor a file that names one")


def histories(answers: list) -> Counter[str]:
    return Counter(user["history"] for _, answer in answers for user in answer["users"])


def point(live: Path, target: Path) -> None:
    """As a release does: a new link is renamed onto the old one."""
    fresh = live.with_name("fresh")
    fresh.symlink_to(target)
    fresh.replace(live)
