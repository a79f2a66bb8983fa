"""Scores of held-out impressions, from raw histories and from caches, and what they are worth."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import msgspec
import numpy as np
import torch
from sklearn.metrics import log_loss, roc_auc_score

from feature_repo.reader import Reader
from jobs.protocols import seen_before
from models.counts import Counter
from models.files import replace_file
from models.ranker import Ranker
from models.request import Impression, Request, collate, counted

BATCH = 32


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """AUC over all candidates; GAUC: AUC per user weighted by candidates, users with both classes; mean log loss."""

    auc: float
    gauc: float
    logloss: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """Logit and label of every candidate, the index of its user, and whether that user had touched it before.

    The order is the impressions' own, so that scores of two models over the same impressions stand side by side.
    """

    logit_N: np.ndarray
    label_N: np.ndarray
    user_N: np.ndarray
    seen_N: np.ndarray

    def where(self, chosen_N: np.ndarray) -> Scores:
        """Those of some candidates."""
        return Scores(**{f.name: getattr(self, f.name)[chosen_N] for f in fields(self)})


def kept_scores(path: Path, score: Callable[[], Scores]) -> Scores:
    """The scores in this file (.npz), which is made whole or not at all by `score` when it is not there."""
    if path.exists():
        with np.load(path) as kept:
            return Scores(**kept)
    scores = score()
    buffer = io.BytesIO()
    np.savez(buffer, **{field.name: getattr(scores, field.name) for field in fields(scores)})
    replace_file(path, buffer.getvalue())
    return scores


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
    # A logit under -709 has a probability of 0.
    with np.errstate(over="ignore"):
        probability_N = 1 / (1 + np.exp(-scores.logit_N.astype(np.float64)))
    return Quality(
        auc=float(roc_auc_score(scores.label_N, scores.logit_N)),
        gauc=group_auc(scores),
        logloss=float(log_loss(scores.label_N, probability_N)),
    )


def group_auc(scores: Scores) -> float:
    """AUC within each user, weighted by the user's candidates; users with a single class have none."""
    auc_U, weight_U = user_aucs(scores)
    return float(auc_U @ weight_U / weight_U.sum()) if weight_U.any() else float("nan")


def user_aucs(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Each user's AUC and number of candidates, both 0 for users with a single class.

    AUC by ranks (Mann-Whitney), equal scores counting half; ranks of all users at once, then less each user's first.
    """
    users = int(scores.user_N.max(initial=-1)) + 1
    value_N = np.unique(scores.logit_N, return_inverse=True)[1]
    order_N = np.lexsort((value_N, scores.user_N))
    user_N, value_N, label_N = scores.user_N[order_N], value_N[order_N], scores.label_N[order_N]
    tied_N = np.cumsum(np.r_[1, (np.diff(user_N) != 0) | (np.diff(value_N) != 0)]) - 1
    tie_T, size_T = np.unique(tied_N, return_index=True, return_counts=True)[1:]
    first_U = np.searchsorted(user_N, np.arange(users))
    rank_N = (tie_T + (size_T - 1) / 2)[tied_N] - first_U[user_N] + 1
    positives_U = np.bincount(user_N, label_N, users)
    total_U = np.bincount(user_N, minlength=users)
    pairs_U = positives_U * (total_U - positives_U)
    above_U = np.bincount(user_N, rank_N * label_N, users) - positives_U * (positives_U + 1) / 2
    return np.divide(above_U, pairs_U, out=np.zeros(users), where=pairs_U > 0), np.where(pairs_U > 0, total_U, 0)


@torch.inference_mode()
def _score(impressions: Sequence[Impression], logits, length: int | None, counter: Counter | None = None) -> Scores:
    logits_I: list[np.ndarray] = [np.zeros(0, np.float32)] * len(impressions)
    # Histories of like length share a batch: padding is work.
    order = sorted(range(len(impressions)), key=lambda i: len(impressions[i].item_L))
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        batch = [impressions[i] for i in places]
        request = collate(batch, length, counted(batch, counter))
        logit_BC = logits(request, batch)
        for i, impression, logit_C in zip(places, batch, logit_BC.numpy(), strict=True):
            logits_I[i] = logit_C[: len(impression.candidate_C)]
    users = {user_id: u for u, user_id in enumerate(dict.fromkeys(i.user_id for i in impressions))}
    return Scores(
        logit_N=np.concatenate(logits_I),
        label_N=np.concatenate([i.label_C for i in impressions]).astype(np.int64),
        user_N=np.repeat([users[i.user_id] for i in impressions], [len(i.candidate_C) for i in impressions]),
        seen_N=np.concatenate([seen_before(i) for i in impressions]),
    )
