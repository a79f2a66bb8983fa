"""What scores over the same impressions say of models: means over seeds, slices, and differences with intervals.

Shapes: S seeds, U users.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from jobs.evaluate import Scores, quality, user_aucs
from jobs.protocols import slices

RESAMPLES = 2_000


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
    """GAUC less that of the reference, and where 95 % of it lies when users are drawn again (paired bootstrap)."""

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
    drawn = np.random.default_rng(seed).multinomial(len(gain_U), np.full(len(gain_U), 1 / len(gain_U)), size=RESAMPLES)
    total = drawn @ weight_U
    gains = np.divide(drawn @ gain_U, total, out=np.zeros(RESAMPLES), where=total > 0)
    low, high = np.percentile(gains, [2.5, 97.5])
    return Difference(mean=float(gain_U.sum() / weight_U.sum()), low=float(low), high=float(high))


def _by_user(by_seed: Sequence[Scores]) -> tuple[np.ndarray, np.ndarray]:
    """AUC by seed and user, and the users' weights, which are the impressions' alone."""
    found = [user_aucs(scores) for scores in by_seed]
    return np.stack([auc_U for auc_U, _ in found]), found[0][1]
