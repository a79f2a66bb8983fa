"""Scores of a batch: each user's own, whatever the others ask; and caches in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from msgspec import structs

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader, ReadLimits
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import row_key
from feature_repo.store import whole_put
from jobs.scoring import Asked, Placement, Scorer, load_scorer, placed
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.event import Event
from models.request import Impression, collate
from models.row import advance, encode_row, new_row
from models.wire import Stamp
from tests.feature_repo.rows import put_all, small_rows
from tests.jobs.serving.shop import CANDIDATES, NOW_MS, put_rows, user_ids
from tests.pipelines.small_log import recent_of
from tests.redis_server import running_redis
from tests.small import HOUR_MS, START_MS, random_events
from tests.small_examples import SIZES
from tests.small_ranker import scoring_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return scoring_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def reader(checkpoint: Checkpoint, tmp_path: Path) -> Reader:
    rows = StoreHandle(state=tmp_path, redis=None).open()
    put_rows(checkpoint, rows)
    return Reader(rows, Opened(checkpoint))


@pytest.fixture
def scorer(checkpoint: Checkpoint, reader: Reader) -> Scorer:
    return load_scorer(checkpoint, reader.fold, reader)


def test_a_batch_gives_each_user_the_scores_it_has_alone(scorer: Scorer):
    rng = np.random.default_rng(0)
    users = [*user_ids(), "nobody", "u0", "u0"]
    asked = [
        Asked(user_id=user, item_ids=list(rng.choice(CANDIDATES, 1 + 5 * n)), now_ms=NOW_MS + n * 10**8)
        for n, user in enumerate(users)
    ]
    together = scorer.score(asked)
    assert [len(user.scores) for user in together.users] == [len(one.item_ids) for one in asked]
    for one, scored in zip(asked, together.users, strict=True):
        (alone,) = scorer.score([one]).users
        assert scored.scores == pytest.approx(alone.scores, abs=1e-5)
        assert (scored.history, scored.unknown) == (alone.history, alone.unknown)
        assert scored.unknown == [n for n, item in enumerate(one.item_ids) if item == "nothing"]
    assert [user.history for user in together.users].count("absent") == 1


@pytest.mark.parametrize("means", ["float16", "bfloat16"])
def test_means_in_half_precision_move_scores_by_their_rounding(checkpoint, reader, scorer, means):
    half = load_scorer(checkpoint, reader.fold, reader, placed("cpu", means))
    asked = [Asked(user_id=user, item_ids=CANDIDATES, now_ms=NOW_MS) for user in user_ids()]
    found, wanted = (np.array([user.scores for user in each.score(asked).users]) for each in (half, scorer))
    assert found == pytest.approx(wanted, abs=2e-2)
    assert not np.array_equal(found, wanted)


WITH_WINDOW = structs.replace(SIZES, window=16, newest=10)


def window_scorer(folder: Path, users: dict[str, list[Event]], means: str = "float32") -> Scorer:
    """Of a checkpoint with a window over the newest events, and an embedded store with the rows of these users."""
    checkpoint = scoring_checkpoint(folder / "checkpoint", sizes=WITH_WINDOW)
    rows, using = StoreHandle(state=folder, redis=None).open(), checkpoint.fold()
    at = Stamp(epoch=1, partition=1, offset=-1)
    for user_id, events in users.items():
        row = new_row(using.spec, 1, 1)
        # Two writes: what is recent comes from both.
        for part in np.array_split(recent_of(checkpoint, events, range(len(events))), 2):
            row, _ = advance(row, part, at, using)
        assert rows.put_rows(checkpoint.checkpoint_id, [whole_put(user_id, row)]) == [True]
    rows.commit_positions(checkpoint.checkpoint_id, 1, {1: 10**6})
    reader = Reader(rows, Opened(checkpoint))
    return load_scorer(checkpoint, reader.fold, reader, placed("cpu", means))


def from_raw(scorer: Scorer, events: list[Event]) -> np.ndarray:
    """Scores by attention over raw events, in the order of training: by event time, then as in the log."""
    table, checkpoint = scorer.table, scorer.reader.checkpoint
    events = sorted(events, key=lambda event: event.event_time_ms)
    one = Impression(
        user_id="",
        now_ms=NOW_MS,
        candidate_C=table.lookup(CANDIDATES),
        label_C=np.zeros(len(CANDIDATES)),
        item_L=table.lookup([event.item_id for event in events]),
        action_L=checkpoint.action_index([event.action for event in events]),
        time_ms_L=np.array([event.event_time_ms for event in events]),
        weight_L=np.array([event.weight for event in events], np.float32),
    )
    with torch.inference_mode():
        return scorer.ranker(collate([one]))[0][0].numpy()


def in_order(count: int, seed: int) -> list[Event]:
    """One user's events, none of them late."""
    return sorted(random_events(count, users=1, seed=seed), key=lambda event: event.event_time_ms)


def scores_of(scorer: Scorer, user_id: str) -> np.ndarray:
    (user,) = scorer.score([Asked(user_id=user_id, item_ids=CANDIDATES, now_ms=NOW_MS)]).users
    return np.array(user.scores)


@pytest.mark.parametrize("means", ["float32", "float16"])
def test_a_window_scores_from_stored_rows_as_from_raw_events(tmp_path, means):
    users = {f"v{count}": in_order(count, count) for count in (1, 3, 10, 15, 16, 17, 33, 70, 300)}
    scorer = window_scorer(tmp_path, users, means)
    error = 1e-5 if means == "float32" else 2e-2
    for user_id, events in users.items():
        assert scores_of(scorer, user_id) == pytest.approx(from_raw(scorer, events), abs=error), user_id
    # Where only rows' newest events differ, scores do.
    last = users["v300"][-1]
    moved = [*users["v300"][:-1], structs.replace(last, item_id="i1" if last.item_id != "i1" else "i2")]
    assert np.abs(from_raw(scorer, moved) - from_raw(scorer, users["v300"])).max() > 1e-3


def test_what_was_taken_back_is_as_if_it_had_not_been_for_both_branches(tmp_path):
    whole = in_order(40, 1)
    # Within reach of what is recent, as a retraction soon after its event is.
    gone = whole[-3]
    back = structs.replace(gone, event_id="back", weight=-gone.weight)
    scorer = window_scorer(tmp_path, {"v": [*whole, back], "w": whole})
    left = [event for event in whole if event is not gone]
    assert scores_of(scorer, "v") == pytest.approx(from_raw(scorer, left), abs=1e-5)
    assert np.abs(scores_of(scorer, "w") - scores_of(scorer, "v")).max() > 1e-3


def test_an_event_that_comes_late_is_in_the_window_by_its_own_time(tmp_path):
    events = in_order(60, 2)
    late = structs.replace(events[-4], event_id="late", item_id="i9")
    old = structs.replace(events[0], event_id="old", item_id="i8", event_time_ms=START_MS - HOUR_MS)
    users = {"late": [*events, late], "old": [*events, old], "both": [*events, old, late]}
    scorer = window_scorer(tmp_path, users)
    for user_id, logged in users.items():
        assert scores_of(scorer, user_id) == pytest.approx(from_raw(scorer, logged), abs=1e-5), user_id


def test_behind_more_late_events_than_a_row_keeps_beside_the_newest_the_newest_are_those_of_the_row(tmp_path):
    early, newest = in_order(40, 3)[:30], in_order(40, 3)[30:]
    late = [structs.replace(e, event_id=f"late{n}", event_time_ms=START_MS - n) for n, e in enumerate(early[-16:])]
    users = {"few": [*early, *newest, *late[:6]], "many": [*early, *newest, *late]}
    scorer = window_scorer(tmp_path, users)
    assert scores_of(scorer, "few") == pytest.approx(from_raw(scorer, users["few"]), abs=1e-5)
    assert np.abs(scores_of(scorer, "many") - from_raw(scorer, users["many"])).max() > 1e-3


def test_a_user_without_a_row_has_scores_as_without_events(tmp_path):
    scorer = window_scorer(tmp_path, {"v": in_order(20, 4)})
    x_1Cd = scorer.ranker.encoder(torch.from_numpy(scorer.table.lookup(CANDIDATES)))[None]
    width = SIZES.heads * (SIZES.value_width + 1)
    with torch.inference_mode():
        wanted = scorer.ranker.logits(x_1Cd, torch.zeros(1, len(CANDIDATES), width))[0].numpy()
    assert scores_of(scorer, "nobody") == pytest.approx(wanted, abs=1e-6)


def test_a_device_that_is_not_there_is_named():
    assert placed("cpu", "float32") == Placement()
    for name in ("cuda:99", "abacus"):
        with pytest.raises(InputError, match=f"--device: '{name}' cannot be used here"):
            placed(name, "float32")


def test_masses_stay_in_full_precision(reader: Reader):
    caches = reader.read(["u0"]).caches.to(torch.device("cpu"), torch.float16)
    assert (caches.mass_BHKR.dtype, caches.mean_BHKRD.dtype) == (torch.float32, torch.float16)


def test_a_flipped_bit_in_one_of_a_hundred_rows_masks_one_user_and_moves_no_other_score(checkpoint, tmp_path):
    fold, rng = checkpoint.fold(), np.random.default_rng(0)
    rows = [row for seed in range(20) for row in small_rows(checkpoint, fold, 400, seed).values()][:100]
    stored = {f"v{n}": row for n, row in enumerate(rows)}
    asked = [Asked(user_id=user, item_ids=CANDIDATES, now_ms=NOW_MS) for user in stored]
    hit = 41
    data = encode_row(stored[f"v{hit}"])
    place, bit = int(rng.integers(len(data.folded))), 1 << int(rng.integers(8))
    with running_redis(tmp_path) as server:
        store = StoreHandle(state=tmp_path, redis=RedisSettings(url=server.url)).open()
        put_all(store, checkpoint, stored)
        reader = Reader(store, Opened(checkpoint), ReadLimits(deadline_s=30.0))
        scorer = load_scorer(checkpoint, fold, reader)
        sound = scorer.score(asked).users
        with server.client() as client:
            key = row_key(checkpoint.checkpoint_id, f"v{hit}")
            flipped = data.folded[:place] + bytes([data.folded[place] ^ bit]) + data.folded[place + 1 :]
            client.hset(key, "f", flipped)
        found = scorer.score(asked).users
        (nobody,) = scorer.score([Asked(user_id="nobody", item_ids=CANDIDATES, now_ms=NOW_MS)]).users
        reader.close()
    assert len(found) == 100
    assert [n for n, user in enumerate(found) if user.history != "fresh"] == [hit]
    assert found[hit].history == "damaged"
    assert found[hit].scores == pytest.approx(nobody.scores, abs=1e-6)
    assert found[hit].scores != sound[hit].scores
    assert all(found[n].scores == sound[n].scores for n in range(100) if n != hit)
