"""A release and the next one under fire: no answer of a wrong or mixed checkpoint, and every row is exact at the end.

One script: v1 is trained, released and streamed; v2 is trained, judged, backfilled while the topic and the streams run
on, shadowed, promoted, rolled back, promoted again, and v1 retired. All by the product's commands, as processes. Two
rankers are asked all the while, and whatever there is is killed (-9) at random moments: streams, rankers, Redis,
commands on their way, the backfill's driver, a Spark worker with its executor. `tests.soak.judging` says what is right;
that it can tell is shown in test_controls.py.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from http.client import HTTPException
from pathlib import Path

import pytest

from feature_repo.store import Backfill
from jobs.local_servers import free_ports
from jobs.releases.states import State
from jobs.releases.table import read_releases
from models.checkpoint import Checkpoint
from tests.jobs.tiny import write_rows
from tests.kafka_broker import Broker
from tests.servers import get
from tests.soak.judging import TOLERANCE, Flip, Judged, Truth, judge, smallest_gap, states
from tests.soak.processes import Killer, Part, after
from tests.soak.reading import FRESH, Reading
from tests.soak.scene import Scene, Store, running_scene
from tests.soak.shoppers import ASKED, DAY_MS, DAYS, NOBODY, Shoppers, Telling, items

pytestmark = [pytest.mark.soak, pytest.mark.spark, pytest.mark.beam, pytest.mark.timeout(3600)]

REQUESTS = int(os.environ.get("VQL_SOAK_REQUESTS") or 3_000)
# Where few are wanted, nobody is in a hurry: Spark has the cores.
PAUSE_S = 100 / REQUESTS
RANKERS = 2
READ_SHARE = min(1.0, 1_000 / REQUESTS)
KILL_EVERY_S = (10.0, 40.0)
# A command is killed so long after its start, unless it has ended.
STEP_LIFE_S, SPARK_LIFE_S = (0.2, 2.0), (3.0, 15.0)
SPARK_KILLED = 0.3
# Of a user's weights in all: rows are float32, and of some hundreds of folds.
ROUNDING = 2e-6
# A hundred users are too few to tell small differences; what the gate refuses is tested elsewhere.
MARGIN = 0.3
TRAINING = [
    *("--field", "category", "--groups", 2, "--codewords", 8, "--window", 4, "--newest", 3),
    *("--epochs", 4, "--per-user", 8),
]


@pytest.fixture
def seed() -> int:
    """A new one for each run unless VQL_SOAK_SEED says which; pytest shows it when the test fails."""
    chosen = int(os.environ.get("VQL_SOAK_SEED") or secrets.randbelow(2**32))
    print(f"VQL_SOAK_SEED={chosen}")
    return chosen


@dataclass(kw_only=True)
class Soak:
    """The script's own memory. cuts: each checkpoint's backfill. now_ms: as of when rankers score."""

    scene: Scene
    rng: random.Random
    telling: Telling
    killer: Killer
    reading: Reading
    begin_ms: int
    now_ms: int
    flips: list[Flip] = field(default_factory=list)
    cuts: dict[str, Backfill] = field(default_factory=dict)

    def prepare(
        self, name: str, seed: int, before_ms: int, do: Callable[..., object], spark: Sequence[object]
    ) -> Checkpoint:
        """From the topic as it is now to a release whose rows are there. spark: where it is trained and backfilled."""
        scene, path = self.scene, self.scene.folder / name
        scene.ingest()
        which = ["--seed", seed, "--before-ms", before_ms]
        do("train", "--checkpoint", path, "--work", scene.folder / f"work-{name}", *TRAINING, *which, *spark)
        scene.steps.run("encode-items", "--checkpoint", path, *scene.locally)
        do("release", "add", path, "--releases", scene.releases)
        judged = ["--margin", MARGIN, "--work", scene.folder / "gate"]
        do("release", "gate", path, "--releases", scene.releases, *judged, *scene.locally)
        do("release", "backfill", path, "--releases", scene.releases, "--state", scene.state, *spark)
        checkpoint = scene.checkpoint(name)
        done = scene.patiently(lambda: scene.rows.backfill(checkpoint.checkpoint_id))
        assert done is not None
        self.cuts[checkpoint.checkpoint_id] = done
        return checkpoint

    def do_under_fire(self, *arguments: object) -> None:
        """Killed on its way, mostly, and given again."""
        steps = self.scene.steps
        if arguments[:2] == ("release", "backfill"):
            self._backfill_under_fire(*arguments)
        elif "--log" not in arguments:
            steps.kill(*arguments, when=after(self.rng.uniform(*STEP_LIFE_S)))
            steps.run_twice_at_once(*arguments)
        else:
            if self.rng.random() < SPARK_KILLED:
                steps.kill(*arguments, when=after(self.rng.uniform(*SPARK_LIFE_S)))
            steps.run(*arguments)

    def _backfill_under_fire(self, *arguments: object) -> None:
        """Killed as a whole with some rows put; then a worker with its executor is lost, and does not come back."""
        scene = self.scene
        checkpoint_id = scene.checkpoint(Path(str(arguments[2])).name).checkpoint_id

        def put_more_than(rows: int) -> Callable[[], bool]:
            return lambda: scene.patiently(lambda: scene.rows.count_rows(checkpoint_id)) > rows

        assert scene.steps.kill(*arguments, when=put_more_than(self.rng.randrange(500))), "ended before all rows"
        held = scene.patiently(lambda: scene.rows.count_rows(checkpoint_id))
        assert held > 0
        assert scene.patiently(lambda: scene.rows.backfill(checkpoint_id)) is None
        machine = self.rng.choice(scene.cluster.workers)
        with scene.steps.beside(*arguments, when=put_more_than(held + self.rng.randrange(500))):
            family = machine.children(recursive=True)
            for process in (machine, *family):
                process.kill()
            scene.place.kills["Spark worker"] += 1
            print(f"backfill: {held} rows from the first run; kill -9 a worker with {len(family)} children")

    def flip(self, step: str, release: Checkpoint, to: Checkpoint) -> None:
        """Another one becomes live: by a command that is killed, and then given by two at once."""
        scene = self.scene
        store = [] if step == "rollback" else ["--state", scene.state]
        self.flips.append(Flip(checkpoint_id=to.checkpoint_id, begun_s=time.monotonic()))
        self.do_under_fire("release", step, release.checkpoint_id, "--releases", scene.releases, *store)
        seconds = self.reading.wait_until_all_follow(to.checkpoint_id)
        print(f"{step}: followed by all within {seconds:.1f} s; {len(self.reading.answers):,} answers so far")

    def read_more(self, share: float) -> None:
        """Until there are more answers by this share of all that are wanted."""
        self.reading.wait_for(len(self.reading.answers) + round(share * REQUESTS))
        self.killer.check()

    def truth(self, *checkpoints: Checkpoint) -> Truth:
        told, shoppers = self.telling.told, self.telling.shoppers
        return Truth(
            flips=self.flips,
            score_SC={
                each.checkpoint_id: states(each, told.events, self.reading.questions, self.now_ms)
                for each in checkpoints
            },
            sent_s=told.sent_s,
            least={
                each: {user: told.at_or_below(user, done.cut) for user in shoppers.asked}
                for each, done in self.cuts.items()
            },
        )


@contextmanager
def soaking(scene: Scene, seed: int) -> Iterator[Soak]:
    """Everything that runs beside the script is ended with it, whatever happens."""
    begin_ms = int(time.time() * 1000) - DAYS * DAY_MS
    shoppers = Shoppers(rng=random.Random(seed), begin_ms=begin_ms)
    now_ms = begin_ms + (DAYS + 1) * DAY_MS
    ports = free_ports(RANKERS)
    with ExitStack() as ending:
        telling = Telling(scene.broker.address, "shopping", shoppers)
        ending.callback(telling.end)
        killer = Killer(random.Random(seed + 1), KILL_EVERY_S, scene.place.kills)
        ending.callback(killer.end)
        reading = Reading(ports, shoppers.questions(), now_ms, seed=seed + 2, pause_s=PAUSE_S)
        ending.callback(reading.end)
        yield Soak(
            scene=scene,
            rng=random.Random(seed + 3),
            telling=telling,
            killer=killer,
            reading=reading,
            begin_ms=begin_ms,
            now_ms=now_ms,
        )


def test_a_release_after_the_other_under_fire(broker: Broker, tmp_path: Path, seed: int, capsys) -> None:
    start_s = time.monotonic()
    with running_scene(tmp_path, broker) as scene, soaking(scene, seed) as soak:
        first, streams = release_the_first(soak)
        rankers = begin_reading(soak)
        second = release_the_second(soak, first, streams)
        settle(soak, first, second)
        retire(soak, first, streams.pop(first.checkpoint_id))
        soak.reading.wait_for(REQUESTS)
        soak.killer.end()
        soak.killer.check()
        soak.reading.end()
        soak.reading.check()
        for part in (*rankers, *streams.values()):
            part.end()
        assert scene.rows.count_rows(first.checkpoint_id) == 0
        found = judge_all(soak, first, second)
        audit_all(scene, first, second)
        with capsys.disabled():
            print(f"\n{figures(soak, found, time.monotonic() - start_s)}")


def release_the_first(soak: Soak) -> tuple[Checkpoint, dict[str, Part]]:
    """In peace: it is trained, judged, backfilled, streamed, promoted."""
    scene, steps = soak.scene, soak.scene.steps
    soak.telling.tell(soak.telling.shoppers.history())
    source = write_rows(scene.folder / "items.parquet", items())
    steps.run("ingest-items", "--input", source, "--column", "category=category", *scene.locally)
    first = soak.prepare("v1", 1, soak.begin_ms + 6 * DAY_MS, steps.run, scene.locally)
    streams = {first.checkpoint_id: scene.stream("v1")}
    soak.killer.add(streams[first.checkpoint_id])
    for step in ("shadow", "promote"):
        steps.run("release", step, first.checkpoint_id, "--releases", scene.releases, "--state", scene.state)
    soak.flips.append(Flip(checkpoint_id=first.checkpoint_id, begun_s=time.monotonic()))
    return first, streams


def begin_reading(soak: Soak) -> list[Part]:
    """From now on the topic goes on, rankers are asked, and everything may be killed."""
    scene = soak.scene
    rankers = [scene.ranker(n, port, READ_SHARE) for n, port in enumerate(soak.reading.ports)]
    soak.telling.start()
    soak.reading.start()
    soak.reading.wait_until_all_follow(soak.flips[0].checkpoint_id)
    for part in (*rankers, Store(scene.store)):
        soak.killer.add(part)
    soak.killer.start()
    return rankers


def release_the_second(soak: Soak, first: Checkpoint, streams: dict[str, Part]) -> Checkpoint:
    """Under fire, and back, and again."""
    scene = soak.scene
    second = soak.prepare("v2", 2, soak.begin_ms + 9 * DAY_MS, soak.do_under_fire, scene.on_cluster)
    streams[second.checkpoint_id] = scene.stream("v2")
    soak.killer.add(streams[second.checkpoint_id])
    shadow = ["release", "shadow", second.checkpoint_id, "--releases", scene.releases, "--state", scene.state]
    soak.do_under_fire(*shadow)
    wait_until_shadowed(soak)
    soak.flip("promote", second, to=second)
    soak.read_more(0.1)
    soak.flip("rollback", second, to=first)
    soak.read_more(0.1)
    soak.flip("promote", second, to=second)
    soak.read_more(0.1)
    return second


def wait_until_shadowed(soak: Soak) -> None:
    """Until a ranker has asked the shadow too."""
    for _ in range(1_200):
        for port in soak.reading.ports:
            try:
                said = get(f"http://127.0.0.1:{port}/metrics")[1]
            except (OSError, HTTPException):
                continue
            if 'vql_shadow_users_total{history="fresh"}' in said:
                return
        soak.killer.check()
        time.sleep(0.1)
    raise AssertionError("no ranker has asked the shadow")


def settle(soak: Soak, *checkpoints: Checkpoint) -> None:
    """The topic ends; streams, still killed, come to its end; then every row is the independent fold of the log."""
    scene = soak.scene
    soak.telling.end()
    told = soak.telling.told
    error_max = ROUNDING * max(sum(event.weight for event in events) for events in told.events.values())
    scene.ingest()
    for checkpoint in checkpoints:
        scene.patiently(lambda checkpoint=checkpoint: scene.wait_until_streamed(checkpoint.checkpoint_id, len(told)))
        found = scene.patiently(lambda checkpoint=checkpoint: scene.parity(checkpoint))
        print(f"{checkpoint.checkpoint_id}: {found}")
        assert found.conserved, found
        assert (found.users, found.log_events, found.row_events) == (len(told.events), len(told), len(told))
        assert found.max_abs_error <= error_max
        assert scene.patiently(lambda checkpoint=checkpoint: scene.rows.count_rows(checkpoint.checkpoint_id)) == len(
            told.events
        )


def retire(soak: Soak, first: Checkpoint, stream: Part) -> None:
    """While rankers are asked for the other one's rows."""
    scene = soak.scene
    soak.killer.leave(stream)
    stream.end()
    command = ["release", "retire", first.checkpoint_id, "--releases", scene.releases, "--state", scene.state]
    soak.do_under_fire(*command, "--idle-s", 5)
    states_now = {each: entry.state for each, entry in read_releases(scene.releases).current.items()}
    assert states_now[first.checkpoint_id] == State.RETIRED
    soak.read_more(0.1)


def judge_all(soak: Soak, first: Checkpoint, second: Checkpoint) -> Judged:
    """All answers, and that they could be told apart; the last answers know all that was told."""
    truth = soak.truth(first, second)
    assert smallest_gap(*truth.score_SC.values()) > 10 * TOLERANCE
    answers = soak.reading.answers
    assert len(answers) >= REQUESTS
    found = judge(answers, truth)
    assert not found.faults, f"{found.faults}\n" + "\n".join(found.examples)
    assert set(found.by_checkpoint) == {first.checkpoint_id, second.checkpoint_id}
    assert found.histories[FRESH] >= REQUESTS, found.histories
    last = {user: answer for answer in answers for user in answer.users}
    assert len(last) == ASKED
    score_SC = truth.score_SC[second.checkpoint_id]
    for user_id, answer in last.items():
        n = list(answer.users).index(user_id)
        if answer.histories[n] == FRESH:
            assert answer.score_UC[n] == pytest.approx(score_SC[user_id][-1], abs=TOLERANCE)
    assert sum(answer.histories[list(answer.users).index(user)] == FRESH for user, answer in last.items()) > NOBODY
    return found


def audit_all(scene: Scene, first: Checkpoint, second: Checkpoint) -> None:
    """No logged read, and no row in the store, is other than the log says."""
    for checkpoint, of_store in ((first, []), (second, ["--store-sample", 10**6])):
        output = scene.folder / f"audit-{checkpoint.checkpoint_id}.json"
        options = ["--checkpoint", checkpoint.path, "--state", scene.state, "--read-log", scene.reads, *of_store]
        # A new user waits for a stream that is killed again and again.
        options += ["--grace", 600]
        scene.steps.run("audit", *options, "--output", output, *scene.on_cluster)
        report = json.loads(output.read_text())
        for name, source in report["sources"].items():
            print(f"audit of {checkpoint.checkpoint_id}, {name}: {source['by_verdict']}")
            assert (source["mismatch_ratio"], source["bad"]) == (0, 0)
            assert source["by_verdict"].keys() <= {"agrees", "late"}
            assert source["compared"] > 0


def figures(soak: Soak, found: Judged, seconds: float) -> str:
    kills, told = soak.scene.place.kills, soak.telling.told
    by_checkpoint = ", ".join(f"{count:,} {each[:8]}" for each, count in found.by_checkpoint.items())
    return (
        f"{found.answers:,} requests, {sum(found.histories.values()):,} users' reads in {seconds:.0f} s, "
        f"{kills.total()} kills ({', '.join(f'{count} {name}' for name, count in sorted(kills.items()))}): "
        f"none of a wrong or mixed checkpoint ({by_checkpoint}; "
        f"{dict(found.histories)}; largest error {found.worst:.1e}; refused {dict(soak.reading.refused)}); "
        f"{len(told):,} events of {len(told.events):,} users"
    )
