"""When a training has learnt what it will: the AUC within impressions, and patience with one that no longer rises.

Knows nothing of models. Shapes: B impressions, C candidates.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float


def auc_within(logit_BC: Float[torch.Tensor, "B C"], label_BC: Float[torch.Tensor, "B C"]) -> Float[torch.Tensor, "B"]:
    """The share of each impression's pairs of a 1 and a 0 that are in order; not a number where there is no pair."""
    won_BCC = (logit_BC[:, :, None] > logit_BC[:, None, :]) + 0.5 * (logit_BC[:, :, None] == logit_BC[:, None, :])
    pair_BCC = (label_BC == 1)[:, :, None] & (label_BC == 0)[:, None, :]
    return (won_BCC * pair_BCC).sum(dim=(1, 2)) / pair_BCC.sum(dim=(1, 2))


@dataclass(kw_only=True, slots=True)
class Patience:
    """The best quality so far, and how many looks since have found none better."""

    best: float = float("-inf")
    waited: int = 0

    def look(self, quality: float) -> bool:
        """Whether this is the best so far."""
        better = quality > self.best
        self.best = max(self.best, quality)
        self.waited = 0 if better else self.waited + 1
        return better
