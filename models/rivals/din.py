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
        self.unit = nn.Sequential(nn.Linear(4 * width, 36), nn.PReLU(), nn.Linear(36, 1))
        self.value = nn.Linear(width, shape.sizes.heads * shape.sizes.value_width, bias=False)

    def forward(self, candidate_BCd, encoder, request):
        newest = request.history.newest(WINDOW)
        event_BLd = encoder(newest.item_BL) + self.action(newest.action_BL)
        target = candidate_BCd[:, :, None, :].expand(-1, -1, event_BLd.shape[1], -1)
        event = event_BLd[:, None, :, :].expand_as(target)
        weight_BCL = self.unit(torch.cat([target, event, target * event, target - event], dim=-1))[..., 0]
        weight_BCL = weight_BCL * newest.weight_BL[:, None, :]
        return torch.einsum("bcl,blv->bcv", weight_BCL, self.value(event_BLd)), candidate_BCd.new_zeros(())
