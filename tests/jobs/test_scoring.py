"""Scores of a batch: each user's own, whatever the others ask; and caches in half precision."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.scoring import Asked, Placement, Scorer, load_scorer, placed
from models.checkpoint import Checkpoint
from models.errors import InputError
from tests.jobs.serving.shop import CANDIDATES, NOW_MS, put_rows, user_ids
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
