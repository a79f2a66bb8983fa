"""DIN (arXiv 1706.06978): target attention over the newest events, each weighted by a small network.

The activation unit sees (candidate, event, candidate * event, candidate - event) and the weights are not
normalised, as in the paper. Values are the events' vectors and their actions. No time enters.
"""

from __future__ import annotations

import torch
from torch import nn

from models.ranker import Shape

WINDOW = 50


class DinHistory(nn.Module):
    """The weighted sum of the newest WINDOW events."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.sizes.width
        self.action = nn.Embedding(shape.actions, width)
        self.pair = nn.Linear(4 * width, 36)
        self.unit = nn.Sequential(nn.PReLU(), nn.Linear(36, 1))
        self.value = nn.Linear(width, shape.sizes.heads * shape.sizes.value_width, bias=False)

    def forward(self, candidate_BCd, encoder, request):
        newest = request.history.newest(WINDOW)
        event_BLd = encoder(newest.item_BL) + self.action(newest.action_BL)
        weight_BCL = self.unit(self._pairs(candidate_BCd, event_BLd))[..., 0] * newest.weight_BL[:, None, :]
        return torch.einsum("bcl,blv->bcv", weight_BCL, self.value(event_BLd)), candidate_BCd.new_zeros(())

    def _pairs(self, candidate_BCd: torch.Tensor, event_BLd: torch.Tensor) -> torch.Tensor:
        """self.pair of (candidate, event, candidate * event, candidate - event), a part at a time: less to multiply."""
        target, event, product, difference = self.pair.weight.chunk(4, dim=1)
        alone_BCh = candidate_BCd @ (target + difference).T + self.pair.bias
        alone_BLh = event_BLd @ (event - difference).T
        joint_BCLh = (candidate_BCd[:, :, None, :] * event_BLd[:, None, :, :]) @ product.T
        return alone_BCh[:, :, None, :] + alone_BLh[:, None, :, :] + joint_BCLh
