"""That the soak can fail: rankers that mix checkpoints or do not follow, and rows that are wrong, are found as such.

A ranker goes through the soak's flips, on small checkpoints that are not trained. First as it is; then with one rule
switched off, by a change of text in a copy of the packages; then with rows that are no state of what was told.
"""

from __future__ import annotations

import math
import os
import sqlite3
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pytest

from feature_repo.handle import StoreHandle
from feature_repo.store import RowStore, whole_put
from jobs.local_servers import free_port
from jobs.releases.states import promoted, rolled_back
from jobs.releases.table import record
from models.checkpoint import Checkpoint
from models.event import Event
from models.row import Fold, Row, RowBytes, advance, encode_row, new_row
from models.wire import Stamp
from tests.changed_copy import REPOSITORY, changed_copy
from tests.jobs.releases.way import take_live, take_to_shadow
from tests.pipelines.small_log import recent_of
from tests.small import HOUR_MS, START_MS, random_events
from tests.small_ranker import COUNTS, scoring_checkpoint
from tests.soak.judging import (
    ANOTHER,
    FLAGGED,
    NO_STATE,
    TOLERANCE,
    TOO_NEW,
    WENT_BACK,
    WRONG_CHECKPOINT,
    Flip,
    Judged,
    Truth,
    judge,
    smallest_gap,
    states,
)
from tests.soak.processes import Part, Place
from tests.soak.reading import FRESH, Reading
from tests.soak.scene import SERVING

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]

USERS, EVENTS, AT_FIRST = 20, 24, 12
# Whose last event is never told.
UNTOLD = "u3"
COPIED = ("models", "feature_repo", "jobs")
NOW_MS = START_MS + 100 * HOUR_MS
ANSWERS = 200


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Two releases, the first of them live, with rows of every user's first events."""

    folder: Path
    first: Checkpoint
    second: Checkpoint
    told: dict[str, list[Event]]

    @property
    def table(self) -> Path:
        return self.folder / "releases"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def rows(self) -> RowStore:
        return StoreHandle(state=self.state, redis=None).open()

    def put(
        self,
        checkpoint: Checkpoint,
        user_id: str,
        events: Sequence[Event],
        using: Fold | None = None,
        revision: int = 0,
    ) -> None:
        row = self.row(checkpoint, events, using or checkpoint.fold(), revision)
        assert self.rows.put_rows(checkpoint.checkpoint_id, [whole_put(user_id, row)]) == [True]

    def row(self, checkpoint: Checkpoint, events: Sequence[Event], using: Fold, revision: int = 0) -> Row:
        """The row of these events, each at the offset that its number gives."""
        recent = recent_of(checkpoint, events, range(len(events)))
        row, _ = advance(new_row(using.spec, 1, 0, revision), recent, Stamp(epoch=1, partition=0, offset=-1), using)
        assert row.count == len(events)
        return row

    def stream(self) -> None:
        """The rest of the events comes into the rows."""
        for checkpoint in (self.first, self.second):
            for user_id, events in self.told.items():
                self.put(checkpoint, user_id, events[:-1] if user_id == UNTOLD else events)

    def overwrite(self, user_id: str, row: Row | RowBytes) -> None:
        """The first checkpoint's row, past the fence."""
        row = encode_row(row) if isinstance(row, Row) else row
        connection = sqlite3.connect(self.state / "online.db")
        with connection:
            connection.execute(
                "UPDATE rows SET folded = ?, recent = ? WHERE user_id = ? AND checkpoint_id = ?",
                (row.folded, row.recent, user_id, self.first.checkpoint_id),
            )
        connection.close()


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    first, second = (scoring_checkpoint(tmp_path / name, n, COUNTS) for n, name in enumerate(("first", "second")))
    told = {
        f"u{n}": sorted(random_events(EVENTS, users=1, seed=n), key=lambda e: e.event_time_ms) for n in range(USERS)
    }
    stage = Stage(folder=tmp_path, first=first, second=second, told=told)
    stage.state.mkdir()
    for checkpoint in (first, second):
        stage.rows.commit_positions(checkpoint.checkpoint_id, 1, {0: 0})
        for user_id, events in told.items():
            stage.put(checkpoint, user_id, events[:AT_FIRST])
    take_live(stage.table, first.checkpoint_id, first.path)
    take_to_shadow(stage.table, second.checkpoint_id, second.path)
    return stage


def play(stage: Stage, packages: Path = REPOSITORY, plant: Callable[[Stage], None] | None = None) -> Judged:
    """Promoted, rolled back, while clients ask and rows go on; something may be planted at the end."""
    first, second = stage.first.checkpoint_id, stage.second.checkpoint_id
    place = Place(folder=stage.folder, environment=os.environ | {"PYTHONPATH": str(packages), "VQL_REDIS_URL": ""})
    port = free_port()
    options = ["--checkpoint", stage.table, "--state", stage.state, "--port", port, "--deadline-ms", 10_000]
    # Rows that are kept would be given in place of older ones, flagged: here they are to be read.
    ranker = Part("ranker", ["serve", *options, "--kept-mb", 0], place, SERVING)
    questions = {user_id: [f"i{n}" for n in range(1, 8)] for user_id in stage.told}
    reading = Reading([port], questions, NOW_MS, seed=0, pause_s=0.01)
    flips = [Flip(checkpoint_id=first, begun_s=0.0)]
    try:
        reading.start()
        reading.wait_until_all_follow(first)
        stage.stream()
        for step, to in ((lambda now: promoted(now, second), second), (lambda now: rolled_back(now, second), first)):
            reading.wait_for(len(reading.answers) + ANSWERS)
            flips.append(Flip(checkpoint_id=to, begun_s=time.monotonic()))
            record(stage.table, step)
            reading.wait_until_all_follow(to)
        reading.wait_for(len(reading.answers) + ANSWERS)
        if plant is not None:
            plant(stage)
            reading.wait_for(len(reading.answers) + ANSWERS)
        reading.end()
        ranker.end()
    finally:
        reading.end()
        place.kill_all()
    score_SC = {each.checkpoint_id: states(each, stage.told, questions, NOW_MS) for each in (stage.first, stage.second)}
    assert smallest_gap(*score_SC.values()) > 10 * TOLERANCE
    least = dict.fromkeys((first, second), dict.fromkeys(stage.told, AT_FIRST))
    sent_s = dict.fromkeys(stage.told, [0.0] * EVENTS) | {UNTOLD: [0.0] * (EVENTS - 1) + [math.inf]}
    found = judge(reading.answers, Truth(flips=flips, score_SC=score_SC, sent_s=sent_s, least=least))
    assert set(found.by_checkpoint) == {first, second}
    print(found)
    return found


def test_a_ranker_as_it_is_gives_no_wrong_answer(stage: Stage) -> None:
    found = play(stage)
    assert not found.faults, found.examples
    assert found.answers > 3 * ANSWERS
    assert found.histories.keys() == {FRESH}


RULES = {
    "a batch is scored by one checkpoint": (
        "jobs/serving/server.py",
        "        batcher = Batcher(lambda asked: live.scorer.score(asked), plan.rules)\n",
        """
        def one_by_one(asked):
            parts = [(time.sleep(0.05), live.scorer.score([one]))[1] for one in asked]
            return replace(parts[0], users=[part.users[0] for part in parts])

        batcher = Batcher(one_by_one, plan.rules)
""",
        ANOTHER,
    ),
    "what is live is all that is asked": (
        "jobs/serving/server.py",
        "        batcher = Batcher(lambda asked: live.scorer.score(asked), plan.rules)\n",
        """
        kept = live.scorer
        batcher = Batcher(
            lambda asked: (kept if asked[0].user_id == "u3" else live.scorer).score(asked), plan.rules
        )
""",
        WRONG_CHECKPOINT,
    ),
}


@pytest.mark.parametrize("rule", RULES)
def test_a_ranker_without_the_rule_is_found(rule: str, stage: Stage, tmp_path: Path) -> None:
    file, text, off, kind = RULES[rule]
    found = play(stage, changed_copy(tmp_path / "copy", COPIED, file, text, off))
    assert found.faults.keys() == {kind}, found.examples


def test_wrong_rows_are_found_each_as_what_it_is(stage: Stage) -> None:
    found = play(stage, plant=plant)
    assert found.users == {
        NO_STATE: {"u0", "u1"},
        WENT_BACK: {"u2"},
        TOO_NEW: {UNTOLD},
        FLAGGED: {"u4", "u5"},
    }, found.examples


def plant(stage: Stage) -> None:
    """Rows of the first checkpoint that are no state of what was told, each sound by itself but the last two."""
    first, told, using = stage.first, stage.told, stage.first.fold()
    # What a ranker would have that takes the codes of one checkpoint for those of the other.
    table = replace(stage.second.fold().table, checkpoint_id=first.checkpoint_id)
    stage.put(first, "u0", told["u0"], replace(using, table=table), revision=1)
    again = msgspec.structs.replace(told["u1"][-1], event_id="again")
    stage.put(first, "u1", [*told["u1"], again])
    stage.overwrite("u2", stage.row(first, told["u2"][:AT_FIRST], using))
    stage.put(first, UNTOLD, told[UNTOLD])
    (sound,) = stage.rows.get_rows(first.checkpoint_id, ["u4"])
    (foreign,) = stage.rows.get_rows(stage.second.checkpoint_id, ["u5"])
    assert sound is not None
    assert foreign is not None
    stage.overwrite("u4", RowBytes(folded=sound.folded[:-9] + b"another b", recent=sound.recent))
    stage.overwrite("u5", foreign)
