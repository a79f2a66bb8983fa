"""Scores of held-out impressions, from raw histories and from caches, and what they are worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score

from feature_repo.reader import Reader
from models.counts import Counter
from models.ranker import Ranker
from models.request import PADDING, Impression, Request, collate

BATCH = 32


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """AUC over all candidates; GAUC: AUC per user weighted by candidates, users with both classes; mean log loss."""

    auc: float
    gauc: float
    logloss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Logit and label of every candidate, with the index of its user, in order."""

    logit_N: np.ndarray
    label_N: np.ndarray
    user_N: np.ndarray


def score_raw(ranker: Ranker, impressions: Sequence[Impression], length: int | None = None) -> Scores:
    """Scores from raw histories: the newest `length` events, or all of them."""
    return _score(impressions, lambda request, _: ranker(request)[0], length, ranker.counter)


def score_cached(ranker: Ranker, reader: Reader, impressions: Sequence[Impression]) -> Scores:
    """Scores from the users' rows in the store: what a ranker serves."""

    def logits(request: Request, batch: Sequence[Impression]) -> torch.Tensor:
        read = reader.read([i.user_id for i in batch])
        return ranker.from_cache(request.candidate_BC, read.caches, request.now_ms_B)

    return _score(impressions, logits, length=1)


def quality(scores: Scores) -> Quality:
    """The three figures of a set of scores."""
    probability_N = 1 / (1 + np.exp(-scores.logit_N.astype(np.float64)))
    return Quality(
        auc=float(roc_auc_score(scores.label_N, scores.logit_N)),
        gauc=group_auc(scores),
        logloss=float(log_loss(scores.label_N, probability_N)),
    )


def group_auc(scores: Scores) -> float:
    """AUC within each user, weighted by the user's candidates; users with a single class have none."""
    order_N = np.argsort(scores.user_N, kind="stable")
    bounds = np.flatnonzero(np.diff(scores.user_N[order_N])) + 1
    total, weight = 0.0, 0
    for rows in np.split(order_N, bounds):
        label = scores.label_N[rows]
        if 0 < label.sum() < len(label):
            total += len(rows) * roc_auc_score(label, scores.logit_N[rows])
            weight += len(rows)
    return total / weight if weight else float("nan")


@torch.inference_mode()
def _score(impressions: Sequence[Impression], logits, length: int | None, counter: Counter | None = None) -> Scores:
    parts = []
    # Histories of like length share a batch: padding is work.
    order = sorted(range(len(impressions)), key=lambda i: len(impressions[i].item_L))
    users = {user_id: u for u, user_id in enumerate(dict.fromkeys(i.user_id for i in impressions))}
    for start in range(0, len(order), BATCH):
        batch = [impressions[i] for i in order[start : start + BATCH]]
        request = collate(batch, length, counter)
        logit_BC = logits(request, batch)
        real_BC = request.label_BC != PADDING
        user_B = torch.tensor([users[i.user_id] for i in batch])
        user_BC = user_B[:, None].expand(real_BC.shape)
        parts.append(torch.stack([logit_BC[real_BC], request.label_BC[real_BC], user_BC[real_BC].float()]).numpy())
    logit_N, label_N, user_N = np.concatenate(parts, axis=1)
    return Scores(logit_N=logit_N, label_N=label_N.astype(int), user_N=user_N.astype(int))
