"""What scores over the same impressions say of models: means over seeds, slices, and differences with intervals.

Shapes: S seeds, U users, N candidates, T distinct scores.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec
import numpy as np

from jobs.evaluate import Scores, quality, user_aucs
from jobs.protocols import slices

RESAMPLES, AUC_RESAMPLES = 2_000, 400


class Over(msgspec.Struct, frozen=True, kw_only=True):
    """A figure over seeds: its mean, and its standard deviation from one seed to another (0 for one seed)."""

    mean: float
    spread: float


class Worth(msgspec.Struct, frozen=True, kw_only=True):
    """Quality over seeds (jobs.evaluate.Quality). None where the figure is not defined: no user has both classes."""

    auc: Over | None
    gauc: Over | None
    logloss: Over | None


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """A figure less the reference's, and where 95 % of it lies when users are drawn again (paired bootstrap)."""

    mean: float
    low: float
    high: float


def over(values: Sequence[float]) -> Over | None:
    """Mean and spread of a figure's values by seed."""
    if not np.isfinite(values).all():
        return None
    spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
    return Over(mean=float(np.mean(values)), spread=spread)


def worth(by_seed: Sequence[Scores]) -> Worth:
    """The figures of one model."""
    found = [quality(scores) for scores in by_seed]
    return Worth(
        auc=over([q.auc for q in found]), gauc=over([q.gauc for q in found]), logloss=over([q.logloss for q in found])
    )


def worth_by_slice(by_seed: Sequence[Scores], protocol: str) -> dict[str, Worth]:
    """The figures on what the user had touched before, and on what not. A slice without both classes is left out."""
    found = {}
    for name, chosen_N in slices(protocol, by_seed[0].seen_N, by_seed[0].label_N).items():
        if len(np.unique(by_seed[0].label_N[chosen_N])) == 2:
            found[name] = worth([scores.where(chosen_N) for scores in by_seed])
    return found


def difference(by_seed: Sequence[Scores], reference: Sequence[Scores], seed: int = 0) -> Difference | None:
    """How far a model's GAUC is from the reference's. None where no user has both classes.

    Each user's AUC is the mean over seeds; then users, of whom both models have been asked the same, are drawn with
    replacement RESAMPLES times (Efron and Tibshirani 1993, chapter 13: percentile intervals).
    """
    (auc_SU, weight_U), (other_SU, _) = _by_user(by_seed), _by_user(reference)
    if not weight_U.any():
        return None
    gain_U = (auc_SU.mean(axis=0) - other_SU.mean(axis=0)) * weight_U
    return _of_users(gain_U, weight_U, _drawn(len(gain_U), RESAMPLES, seed))


def difference_of_logloss(scores: Scores, reference: Scores, seed: int = 0) -> Difference:
    """How far the mean log loss of all candidates is from the reference's, as `difference` has it of GAUC."""
    weight_U = np.bincount(scores.user_N)
    gain_U = np.bincount(scores.user_N, _losses(scores) - _losses(reference))
    return _of_users(gain_U, weight_U, _drawn(len(gain_U), RESAMPLES, seed))


def difference_of_auc(scores: Scores, reference: Scores, seed: int = 0) -> Difference:
    """How far the AUC over all candidates is from the reference's, as `difference` has it of GAUC.

    It is no sum over users: each of AUC_RESAMPLES takes a pass over the candidates.
    """
    one_U = np.ones(scores.user_N.max() + 1)
    aucs = [_weighted_auc(scores), _weighted_auc(reference)]
    mean = aucs[0](one_U) - aucs[1](one_U)
    drawn = _drawn(len(one_U), AUC_RESAMPLES, seed)
    low, high = np.percentile([aucs[0](weight_U) - aucs[1](weight_U) for weight_U in drawn], [2.5, 97.5])
    return Difference(mean=float(mean), low=float(low), high=float(high))


def _drawn(users: int, resamples: int, seed: int) -> np.ndarray:
    """How often each user is drawn, resample by resample."""
    return np.random.default_rng(seed).multinomial(users, np.full(users, 1 / users), size=resamples)


def _of_users(gain_U: np.ndarray, weight_U: np.ndarray, drawn: np.ndarray) -> Difference:
    """Of a mean over users with weights; gain_U has its weight in it."""
    total = drawn @ weight_U
    gains = np.divide(drawn @ gain_U, total, out=np.zeros(len(drawn)), where=total > 0)
    low, high = np.percentile(gains, [2.5, 97.5])
    return Difference(mean=float(gain_U.sum() / weight_U.sum()), low=float(low), high=float(high))


def _losses(scores: Scores) -> np.ndarray:
    """log(1 + exp(-logit)) of positives, log(1 + exp(logit)) of negatives; at most what float64 can tell."""
    losses = np.logaddexp(0, np.where(scores.label_N == 1, -1.0, 1.0) * scores.logit_N.astype(np.float64))
    return np.minimum(losses, -np.log(np.finfo(np.float64).eps))


def _weighted_auc(scores: Scores) -> Callable[[np.ndarray], float]:
    """From users' weights to the AUC over all candidates; equal scores count half (Mann-Whitney). Sorted once."""
    order_N = np.argsort(scores.logit_N, kind="stable")
    user_N, label_N = scores.user_N[order_N], scores.label_N[order_N]
    first_T = np.unique(scores.logit_N[order_N], return_index=True)[1]

    def auc(weight_U: np.ndarray) -> float:
        weight_N = weight_U[user_N]
        positive_T = np.add.reduceat(weight_N * label_N, first_T)
        negative_T = np.add.reduceat(weight_N * (1 - label_N), first_T)
        below_T = np.cumsum(negative_T) - negative_T / 2
        pairs = positive_T.sum() * negative_T.sum()
        return float(positive_T @ below_T / pairs) if pairs else 0.5

    return auc


def _by_user(by_seed: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    """AUC by seed and user, and the users' weights, which are the impressions' alone."""
    found = [user_aucs(scores) for scores in by_seed]
    return np.stack([auc_U for auc_U, _ in found]), found[0][1]
