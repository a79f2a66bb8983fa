"""Scores of a batch: each user's own, whatever the others ask; and caches in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader, ReadLimits
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import row_key
from jobs.scoring import Asked, Placement, Scorer, load_scorer, placed
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.row import encode_row
from tests.feature_repo.rows import put_all, small_rows
from tests.jobs.serving.shop import CANDIDATES, NOW_MS, put_rows, user_ids
from tests.redis_server import running_redis
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
