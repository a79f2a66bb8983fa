"""One user's candidates, best first, from the row alone; and every reason why there is no answer."""

from __future__ import annotations

import sqlite3
import time
from pathlib import Path

import numpy as np
import pytest

from feature_repo.handle import StoreHandle
from feature_repo.store import row_puts
from jobs.rank import rank_user
from models.checkpoint import Checkpoint
from models.counts import CountPlan
from models.errors import ForeignRowError, InputError, WireError
from models.load import load_ranker
from models.request import Impression, collate, counted
from models.row import advance, new_row
from models.wire import Stamp
from tests.pipelines.small_log import recent_of
from tests.small import HOUR_MS, START_MS, random_events, small_checkpoint
from tests.small_ranker import COUNTS, scoring_checkpoint

CANDIDATES = ["i1", "i2", "nothing", "i3", "i4"]
EVENTS, NOW_MS = 30, START_MS + 100 * HOUR_MS


@pytest.fixture
def counts() -> CountPlan | None:
    return None


@pytest.fixture
def checkpoint(tmp_path: Path, counts: CountPlan | None) -> Checkpoint:
    return scoring_checkpoint(tmp_path / "checkpoint", counts=counts)


@pytest.fixture
def state(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    """A store with the row of user u0."""
    (tmp_path / "state").mkdir()
    put(tmp_path / "state", checkpoint, checkpoint.checkpoint_id)
    return tmp_path / "state"


def put(state: Path, checkpoint: Checkpoint, checkpoint_id: str) -> None:
    """u0's row of this checkpoint under that id."""
    position = Stamp(epoch=1, partition=1, offset=-1)
    recent = recent_of(checkpoint, random_events(EVENTS, users=1), range(EVENTS))
    row, _ = advance(new_row(checkpoint.spec, 1, 1), recent, position, checkpoint.fold())
    rows = StoreHandle(state=state).open()
    assert rows.put_rows(checkpoint_id, row_puts(["u0"], [row], [None])) == [True]
    rows.commit_positions(checkpoint_id, 1, {1: EVENTS})


@pytest.mark.parametrize("counts", [None, COUNTS])
def test_candidates_come_best_first_with_the_scores_of_raw_attention(checkpoint: Checkpoint, state: Path) -> None:
    ranked = rank_user("u0", CANDIDATES, checkpoint.path, state, NOW_MS)

    using = checkpoint.fold()
    events = random_events(EVENTS, users=1)
    asked = Impression(
        user_id="u0",
        now_ms=NOW_MS,
        candidate_C=using.table.lookup(CANDIDATES),
        label_C=np.zeros(len(CANDIDATES)),
        item_L=using.table.lookup([e.item_id for e in events]),
        action_L=checkpoint.action_index([e.action for e in events]),
        time_ms_L=np.array([e.event_time_ms for e in events]),
        weight_L=np.array([e.weight for e in events], np.float32),
    )
    ranker = load_ranker(checkpoint, using.table.feature_MF, using.table.cell_MQ)
    logits = ranker(collate([asked], counts=counted([asked], ranker.counter)))[0][0].tolist()
    wanted = sorted(zip(CANDIDATES, logits, strict=True), key=lambda pair: -pair[1])
    assert [item for item, _, _ in ranked.candidates] == [item for item, _ in wanted]
    assert [score for _, score, _ in ranked.candidates] == pytest.approx([score for _, score in wanted], abs=1e-5)
    assert len({score for _, score, _ in ranked.candidates}) == len(CANDIDATES)


def test_it_says_what_it_read_and_which_items_it_does_not_know(checkpoint: Checkpoint, state: Path) -> None:
    ranked = rank_user("u0", CANDIDATES, checkpoint.path, state, NOW_MS)
    assert (ranked.events, ranked.stamp) == (EVENTS, f"1:1:{EVENTS - 1}.0")
    assert [item for item, _, known in ranked.candidates if not known] == ["nothing"]


def test_without_a_time_it_is_the_clocks(checkpoint: Checkpoint, state: Path) -> None:
    def scores(now_ms: int | None) -> dict[str, float]:
        found = rank_user("u0", CANDIDATES, checkpoint.path, state, now_ms).candidates
        return {item: score for item, score, _ in found}

    assert scores(None) == pytest.approx(scores(int(time.time() * 1000)), abs=1e-4)
    # Years have gone since: how much the user does fades, and the head is told.
    assert scores(None) != pytest.approx(scores(NOW_MS), abs=1e-3)


def test_a_user_without_a_row_is_named(checkpoint: Checkpoint, state: Path) -> None:
    with pytest.raises(InputError, match=f"user 'nobody' has no row of checkpoint {checkpoint.checkpoint_id}"):
        rank_user("nobody", ["i1"], checkpoint.path, state)
    with pytest.raises(InputError, match="no candidates"):
        rank_user("u0", [], checkpoint.path, state)


@pytest.mark.parametrize("part", ["folded", "recent"])
def test_a_damaged_row_is_no_answer(checkpoint: Checkpoint, state: Path, part: str) -> None:
    (file,) = state.glob("*.db")
    with sqlite3.connect(file) as connection:
        connection.execute(f"UPDATE rows SET {part} = substr({part}, 1, length({part}) - 1)")
    connection.close()
    with pytest.raises(WireError, match=r"the row of user 'u0' in .* is damaged"):
        rank_user("u0", ["i1"], checkpoint.path, state)


def test_the_row_of_another_checkpoint_is_no_answer(checkpoint: Checkpoint, state: Path, tmp_path: Path) -> None:
    foreign = small_checkpoint(tmp_path / "foreign")
    StoreHandle(state=state).open().delete_user("u0")
    put(state, foreign, checkpoint.checkpoint_id)
    with pytest.raises(ForeignRowError, match=r"the row of user 'u0' in .* is foreign"):
        rank_user("u0", ["i1"], checkpoint.path, state)
