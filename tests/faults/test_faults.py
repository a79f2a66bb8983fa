"""A million real events over Kafka into Redis, with the faults that production brings: every user's row is exact.

Each test streams the whole log into a store of its own by the product's own stream, in processes that are killed,
doubled and cut off, and then compares every row with `tests.faults.reference`. That each of them can fail is shown in
test_controls.py.
"""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.faults.proxy import running_proxy
from tests.faults.runner import Streams
from tests.faults.scene import Scene, require_done, wait_until
from tests.redis_server import PERSISTENT, RedisServer, running_redis

pytestmark = [pytest.mark.faults, pytest.mark.timeout(900)]

# From before the first record is read to some bundles later.
KILLS, LIFE_S = 20, (0.2, 4.0)
COPIES_MAX = 5
HANGS_S, DOWN_S = 8.0, 30.0
SLOW_S, LATE_S, LOST_SHARE = 60.0, (0.05, 0.2), 0.05


@pytest.fixture
def persistent_store(tmp_path: Path) -> Iterator[RedisServer]:
    """A store that has on disk whatever it acknowledged."""
    with running_redis(tmp_path, PERSISTENT) as server:
        yield server


def test_a_run_without_faults(whole: Scene, streams: Streams, store: RedisServer, tmp_path: Path) -> None:
    rows = whole.begin(store)

    ended = require_done(streams.run(whole.job(store.url, tmp_path / "state")))

    assert ended.report["events_folded"] == len(whole.log) - len(whole.log.bad_positions)
    whole.require_exact(rows, tmp_path / "state")


def test_kill_9_at_random_moments(
    whole: Scene, streams: Streams, store: RedisServer, tmp_path: Path, seed: int
) -> None:
    rows, rng = whole.begin(store), random.Random(seed)
    job = replace(whole.job(store.url, tmp_path / "state"), bundle_s=0.5)

    for kill in range(KILLS):
        running, until_s = streams.start(job), time.monotonic() + rng.uniform(*LIFE_S)
        # On a fast machine the log must not end before the last kill.
        far = len(whole.log) * (kill + 1) // (KILLS + 5)
        wait_until(lambda: time.monotonic() > until_s or sum(whole.committed(rows).values()) > far)  # noqa: B023
        running.kill()
        print(f"killed at {sum(whole.committed(rows).values()):,}")
    require_done(streams.run(job))

    whole.require_exact(rows, tmp_path / "state")


def test_batches_are_delivered_up_to_five_times(
    whole: Scene, streams: Streams, store: RedisServer, tmp_path: Path, seed: int
) -> None:
    rows = whole.begin(store)
    job = replace(whole.job(store.url, tmp_path / "state"), copies_max=COPIES_MAX, seed=seed)

    ended = require_done(streams.run(job))

    assert ended.report["events_skipped"] > len(whole.log)
    whole.require_exact(rows, tmp_path / "state")


def test_two_processes_on_the_same_partitions(
    whole: Scene, streams: Streams, store: RedisServer, tmp_path: Path
) -> None:
    rows = whole.begin(store)
    job = whole.job(store.url, tmp_path / "state")

    both = [streams.start(job) for _ in range(2)]
    ended = [require_done(each.wait()) for each in both]

    assert sum(each.report["conflicts"] for each in ended) > 0, "they never met"
    assert sum(each.report["events_folded"] for each in ended) == len(whole.log) - len(whole.log.bad_positions)
    whole.require_exact(rows, tmp_path / "state")


def test_the_store_hangs_and_is_down_for_a_while(
    whole: Scene, streams: Streams, persistent_store: RedisServer, tmp_path: Path
) -> None:
    store, rows = persistent_store, whole.begin(persistent_store)

    running = streams.start(whole.job(store.url, tmp_path / "state"))
    wait_until(lambda: sum(whole.committed(rows).values()) > len(whole.log) // 4)
    assert store.process is not None
    # Longer than a client waits: what it sent is done later, and its second try after it.
    store.process.send_signal(signal.SIGSTOP)
    time.sleep(HANGS_S)
    store.process.send_signal(signal.SIGCONT)
    wait_until(lambda: sum(whole.committed(rows).values()) > len(whole.log) // 2)
    store.kill()
    time.sleep(DOWN_S)
    store.start()
    require_done(running.wait())

    whole.require_exact(rows, tmp_path / "state")


def test_the_store_is_slow_for_a_while_and_its_answers_get_lost(
    whole: Scene, streams: Streams, store: RedisServer, tmp_path: Path, seed: int
) -> None:
    rows = whole.begin(store)

    with running_proxy(store.port, seed) as proxy:
        proxy.late_s, proxy.lost_share = LATE_S, LOST_SHARE
        # Small batches need more answers than a slow store can give in this time.
        running = streams.start(replace(whole.job(proxy.url, tmp_path / "state"), batch_size=4_000))
        time.sleep(SLOW_S)
        proxy.late_s, proxy.lost_share = (0.0, 0.0), 0.0
        print(f"{proxy.answers} answers, {proxy.lost} lost")
        assert running.is_alive(), "it had ended before the store was fast again"
        ended = require_done(running.wait())

    assert ended.report["conflicts"] > 0, "no answer to a put was lost"
    whole.require_exact(rows, tmp_path / "state")
