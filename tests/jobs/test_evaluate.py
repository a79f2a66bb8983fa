"""The figures agree with hand-made cases, and rows score as raw histories do."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.backfill import backfill
from jobs.evaluate import Scores, group_auc, quality, score_cached, score_raw, user_aucs
from models.checkpoint import open_checkpoint
from models.load import load_ranker
from models.ranker import Ranker
from models.request import Impression
from tests.jobs.tiny import DAYS, Shop, logged
from tests.small import START_MS


def scores(*users: list[tuple[float, int]]) -> Scores:
    """(logit, label) of each user's candidates."""
    flat = [(logit, label, u) for u, rows in enumerate(users) for logit, label in rows]
    logit_N, label_N, user_N = map(np.array, zip(*flat, strict=True))
    return Scores(logit_N=logit_N, label_N=label_N, user_N=user_N, seen_N=np.zeros(len(label_N), bool))


PERFECT = [(2.0, 1), (1.0, 0), (0.0, 0)]
WRONG = [(1.0, 0), (0.0, 1)]
ONE_CLASS = [(9.0, 0), (8.0, 0), (7.0, 0), (6.0, 0)]


def test_auc_within_users_is_weighted_by_candidates() -> None:
    assert group_auc(scores(PERFECT)) == 1.0
    assert group_auc(scores(WRONG)) == 0.0
    assert group_auc(scores(PERFECT, WRONG)) == pytest.approx(3 / 5)
    assert group_auc(scores([(1.0, 0), (1.0, 1)])) == 0.5


def test_a_user_with_one_class_has_no_part_in_gauc() -> None:
    assert group_auc(scores(PERFECT, ONE_CLASS, WRONG)) == pytest.approx(3 / 5)
    assert math.isnan(group_auc(scores(ONE_CLASS)))


def test_gauc_finds_a_users_candidates_wherever_they_are() -> None:
    whole = scores(PERFECT, WRONG, PERFECT)
    order = np.random.default_rng(0).permutation(len(whole.logit_N))
    assert group_auc(whole.where(order)) == group_auc(whole) == pytest.approx(6 / 8)


@given(st.lists(st.lists(st.tuples(st.sampled_from([-1.0, 0.0, 0.5, 2.0]), st.integers(0, 1)), max_size=9), max_size=5))
def test_the_auc_of_each_user_is_the_known_one(users: list) -> None:
    users = [rows for rows in users if rows]
    if not users:
        return
    auc_U, weight_U = user_aucs(scores(*users))
    for rows, auc, weight in zip(users, auc_U, weight_U, strict=True):
        logit, label = zip(*rows, strict=True)
        both = 0 < sum(label) < len(label)
        assert weight == (len(rows) if both else 0)
        assert auc == pytest.approx(roc_auc_score(label, logit) if both else 0.0)


def test_auc_is_over_all_candidates_and_log_loss_is_of_probabilities() -> None:
    found = quality(scores(PERFECT, ONE_CLASS))
    # The one positive is above two of six negatives.
    assert found.auc == pytest.approx(2 / 6)
    assert found.gauc == 1.0
    assert quality(scores([(0.0, 1), (0.0, 0)])).logloss == pytest.approx(math.log(2))
    sure = quality(scores([(math.log(3), 1), (-math.log(3), 0)])).logloss
    assert sure == pytest.approx(-math.log(0.75))


@pytest.fixture(scope="module")
def served(spark, shop: Shop, tmp_path_factory: pytest.TempPathFactory) -> tuple[Ranker, Reader, list[Impression]]:
    """The shop's ranker, its rows, and one impression of each user after the log's end."""
    checkpoint = open_checkpoint(shop.checkpoint)
    store = StoreHandle(state=tmp_path_factory.mktemp("state"))
    backfill(spark, checkpoint, shop.log, store)
    using = checkpoint.fold()
    ranker = load_ranker(checkpoint, using.table.feature_MF)
    return ranker, Reader(store.open(), Opened(checkpoint)), impressions(shop.log, checkpoint, using)


def impressions(log: Path, checkpoint, using) -> list[Impression]:
    users: dict[str, list[dict]] = {}
    for row in logged(log):
        users.setdefault(row["user_id"], []).append(row)
    rng = np.random.default_rng(0)
    return [
        Impression(
            user_id=user_id,
            now_ms=START_MS + (DAYS + n % 3) * 86_400_000,
            candidate_C=rng.integers(0, len(using.table), 2 + n % 4),
            label_C=np.r_[1, np.zeros(1 + n % 4)],
            item_L=using.table.lookup([e["item_id"] for e in events]),
            action_L=checkpoint.action_index([e["action"] for e in events]),
            time_ms_L=np.array([e["event_time_ms"] for e in events]),
            weight_L=np.array([e["weight"] for e in events], np.float32),
        )
        for n, (user_id, events) in enumerate(users.items())
    ]


@pytest.mark.spark
def test_rows_score_as_the_raw_histories_do(served) -> None:
    ranker, reader, asked = served
    cached, raw = score_cached(ranker, reader, asked), score_raw(ranker, asked)
    assert len(raw.logit_N) == sum(len(i.candidate_C) for i in asked)
    assert np.array_equal(cached.label_N, raw.label_N)
    assert np.array_equal(cached.user_N, raw.user_N)
    assert np.abs(cached.logit_N - raw.logit_N).max() < 1e-5
    assert quality(cached).gauc == pytest.approx(quality(raw).gauc, abs=1e-6)


@pytest.mark.spark
def test_the_comparison_of_scores_can_fail(served) -> None:
    ranker, reader, asked = served
    cached, newest = score_cached(ranker, reader, asked), score_raw(ranker, asked, length=5)
    assert np.abs(cached.logit_N - newest.logit_N).max() > 1e-3
