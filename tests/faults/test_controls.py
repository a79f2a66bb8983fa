"""That the fault tests can fail: each scenario, with the rule that protects it switched off, gives rows that differ.

A rule is switched off by one change of text in a copy of the packages that a stream is made of. The scenarios are
those of test_faults.py made sharp, over the first events of the log: the fault comes at the one moment at which the
rule is needed. The same sharp scenario passes with the code as it is, so it is the rule that makes the difference.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from msgspec.structs import replace

from tests.changed_copy import changed_copy
from tests.faults.proxy import running_proxy
from tests.faults.reference import Differences
from tests.faults.runner import Job, Streams, running_streams
from tests.faults.scene import Scene, require_done, wait_until
from tests.redis_server import MEMORY_ONLY, PERSISTENT, RedisServer, running_redis

pytestmark = [pytest.mark.faults, pytest.mark.timeout(300)]

COPIED = ("models", "feature_repo", "pipelines", "tests/faults")
STORE_ERROR = 5
AWAY_S = 8.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """Where a scenario is played."""

    scene: Scene
    streams: Streams
    store: RedisServer
    folder: Path

    def job(self, url: str) -> Job:
        """Over the scene's topic, in whole batches: with a first one of a few records most scenarios would be none."""
        return replace(self.scene.job(url, self.folder), full_batches=True)


def run_to_the_end(stage: Stage) -> Differences:
    rows = stage.scene.begin(stage.store)

    stage.streams.run(stage.job(stage.store.url))

    return stage.scene.compare(rows)


def kill_between_put_and_commit(stage: Stage) -> Differences:
    """Then the records come again, cut into larger batches."""
    scene, rows = stage.scene, stage.scene.begin(stage.store)
    job = replace(stage.job(stage.store.url), batch_size=1_000, bundle_s=600.0)

    running = stage.streams.start(job)
    wait_until(lambda: rows.count_rows(scene.checkpoint.checkpoint_id) > 0)
    running.kill()
    assert scene.committed(rows) == {}
    stage.streams.run(replace(job, batch_size=10_000))

    return scene.compare(rows)


def kill_at_the_first_commit(stage: Stage) -> Differences:
    scene, rows = stage.scene, stage.scene.begin(stage.store)
    job = replace(stage.job(stage.store.url), bundle_s=0.1)

    running = stage.streams.start(job)
    wait_until(lambda: scene.committed(rows) != {}, interval_s=0.0)
    running.kill()
    require_done(stage.streams.run(job))

    return scene.compare(rows)


def deliver_batches_that_overlap(stage: Stage) -> Differences:
    rows = stage.scene.begin(stage.store)

    stage.streams.run(replace(stage.job(stage.store.url), copies_max=1))

    return stage.scene.compare(rows)


def put_late_what_another_process_has_put(stage: Stage) -> Differences:
    """A process reads rows and stalls; another goes on to the end; the first one puts what it made, and dies."""
    scene, store, rows = stage.scene, stage.store, stage.scene.begin(stage.store)

    with running_proxy(store.port) as proxy, store.client() as client:
        # The first few rows' answer is late, so all others are asked for at once: these are what it reads and keeps.
        proxy.late_s = (0.05, 0.05)
        proxy.hold_at, proxy.hold_after = b"HMGET", 1
        stalled = stage.streams.start(replace(stage.job(proxy.url), redis_timeout_s=120.0))
        assert proxy.held.wait(60.0)
        require_done(stage.streams.run(stage.job(store.url)))
        scripts = client.info("commandstats")["cmdstat_evalsha"]["calls"]
        proxy.release()
        wait_until(lambda: client.info("commandstats")["cmdstat_evalsha"]["calls"] > scripts + 20)
        stalled.kill()

    return scene.compare(rows)


def refuse_a_put_of_which_half_is_new(stage: Stage) -> Differences:
    """A process reads rows and stalls; another puts the first part of the same records, and dies; the first goes on."""
    scene, store, rows = stage.scene, stage.store, stage.scene.begin(stage.store)

    with running_proxy(store.port) as proxy:
        proxy.hold_at = b"HMGET"
        stalled = stage.streams.start(replace(stage.job(proxy.url), redis_timeout_s=120.0))
        assert proxy.held.wait(60.0)
        other = stage.streams.start(replace(stage.job(store.url), batch_size=1_000, bundle_s=600.0))
        wait_until(lambda: rows.count_rows(scene.checkpoint.checkpoint_id) > 0)
        other.kill()
        proxy.release()
        ended = require_done(stalled.wait())

    assert ended.report["conflicts"] > 0
    return scene.compare(rows)


def take_the_store_away(stage: Stage) -> Differences:
    """For longer than a single call waits; what was acknowledged is on its disk."""
    scene, store, rows = stage.scene, stage.store, stage.scene.begin(stage.store)

    running = stage.streams.start(replace(stage.job(store.url), batch_size=1_000, bundle_s=0.1, redis_timeout_s=0.5))
    wait_until(lambda: scene.committed(rows) != {})
    store.kill()
    time.sleep(AWAY_S)
    store.start()
    ended = running.wait()
    assert ended.code in (0, STORE_ERROR), ended.output

    return scene.compare(rows)


def set_the_store_back(stage: Stage) -> Differences:
    """The store restarts from an older snapshot under a running stream; one that stops for it is started again."""
    scene, store, rows = stage.scene, stage.store, stage.scene.begin(stage.store)

    with running_proxy(store.port) as proxy, store.client() as client:
        proxy.late_s = (0.05, 0.05)
        job = replace(stage.job(proxy.url), batch_size=2_000, bundle_s=0.5)
        running = stage.streams.start(job)
        wait_until(lambda: len(scene.committed(rows)) > 0)
        client.save()
        # What the rows held then, at most: commits are behind the rows, and only rows that came later can be lost.
        held = scene.compare(rows).events
        wait_until(lambda: sum(scene.committed(rows).values()) > held + 10_000)
        store.kill()
        rows.close()
        store.start()
        ended = running.wait()
        assert ended.code in (0, STORE_ERROR), ended.output
        if ended.code == STORE_ERROR:
            assert "went back to an earlier state" in ended.output
            require_done(stage.streams.run(job))

    return scene.compare(rows)


@dataclass(frozen=True, kw_only=True, slots=True)
class Rule:
    """A rule, the change that switches it off, and what then becomes of users in the scenarios that need it."""

    file: str
    text: str
    off: str
    scenarios: Sequence[Callable[[Stage], Differences]]
    outcome: str
    store_options: Sequence[str] = MEMORY_ONLY


RULES = {
    "a late event counts by its own time": Rule(
        file="models/cache.py",
        text="        reference_ms - events.time_ms_N,\n",
        off="        0 * events.time_ms_N,\n",
        scenarios=[run_to_the_end],
        outcome="wrong",
    ),
    "skipped by stamp": Rule(
        file="models/wire.py",
        text="return (epoch, offset) <= (self.epoch, self.offset)",
        off="return False",
        scenarios=[kill_between_put_and_commit, deliver_batches_that_overlap],
        outcome="doubled",
    ),
    "committed after the put": Rule(
        file="pipelines/kafka_source.py",
        text="        return self._current\n",
        off="        self._source.ledger.commit(self._partition, self._offset)\n        return self._current\n",
        scenarios=[kill_at_the_first_commit],
        outcome="lost",
    ),
    "put only if newer, and after the row that was read": Rule(
        file="feature_repo/redis_scripts.py",
        text="    if follows_it and newer then\n",
        off="    if true then\n",
        scenarios=[put_late_what_another_process_has_put],
        outcome="lost",
    ),
    "redone when refused": Rule(
        file="pipelines/update.py",
        text="        if not refused:\n",
        off="        if True:\n",
        scenarios=[refuse_a_put_of_which_half_is_new],
        outcome="lost",
    ),
    "a store that is away is waited for": Rule(
        file="feature_repo/patient_rows.py",
        text="retry=retry_if_exception_type(UnavailableError),",
        off="retry=retry_if_exception_type(()),",
        scenarios=[take_the_store_away],
        outcome="missing",
        store_options=PERSISTENT,
    ),
    "a store that lost puts is noticed": Rule(
        file="feature_repo/redis_store.py",
        text="            self._puts += 1\n",
        off="            self._puts += 0\n",
        scenarios=[set_the_store_back],
        outcome="lost",
    ),
}


@pytest.mark.parametrize("name", RULES)
def test_without_the_rule_rows_differ(name: str, part: Scene, tmp_path: Path) -> None:
    rule = RULES[name]

    copy = changed_copy(tmp_path / "copy", COPIED, rule.file, rule.text, rule.off)
    (copy / "tests" / "__init__.py").touch()
    with running_streams(copy) as streams:
        for found in play(rule, part, streams, tmp_path):
            assert getattr(found, rule.outcome), found


@pytest.mark.parametrize("name", RULES)
def test_with_every_rule_the_same_scenario_gives_exact_rows(
    name: str, part: Scene, streams: Streams, tmp_path: Path
) -> None:
    for found in play(RULES[name], part, streams, tmp_path):
        assert not found.who, found
        assert found.strangers == 0


def play(rule: Rule, scene: Scene, streams: Streams, folder: Path) -> Iterator[Differences]:
    """How each of the rule's scenarios ends, with a store of its own."""
    for scenario in rule.scenarios:
        mine = folder / scenario.__name__
        mine.mkdir()
        with running_redis(mine, rule.store_options) as store:
            yield scenario(Stage(scene=scene, streams=streams, store=store, folder=mine))
