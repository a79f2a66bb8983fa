"""DIN (arXiv 1706.06978): target attention over the newest events, each weighted by a small network.

The activation unit sees (candidate, event, candidate * event, candidate - event) and the weights are not
normalised, as in the paper. Values are the events' vectors and their actions. Time enters only where the unit sees
the event's age too (`din_with_time`).
"""

from __future__ import annotations

import torch
from torch import nn

from models.ranker import Shape
from models.rivals.events import EVENT_BYTES, LogAge

WINDOW = 50
HIDDEN = 36


class DinHistory(nn.Module):
    """The weighted sum of the newest WINDOW events; `age` (HIDDEN wide), if any, is one more input of the unit."""

    def __init__(self, shape: Shape, age: LogAge | None = None) -> None:
        super().__init__()
        width = shape.sizes.width
        self.action = nn.Embedding(shape.actions, width)
        self.pair = nn.Linear(4 * width, HIDDEN)
        self.age = age
        self.unit = nn.Sequential(nn.PReLU(), nn.Linear(HIDDEN, 1))
        self.value = nn.Linear(width, shape.sizes.heads * shape.sizes.value_width, bias=False)

    def user_bytes(self, length: int) -> int:
        """The newest events."""
        return min(length, WINDOW) * EVENT_BYTES

    def forward(self, candidate_BCd, encoder, request):
        newest = request.history.newest(WINDOW)
        event_BLd = encoder(newest.item_BL) + self.action(newest.action_BL)
        hidden_BCLh = self._pairs(candidate_BCd, event_BLd)
        if self.age is not None:
            # A linear layer over the pair and an embedded bucket is one over the pair, and a row per bucket.
            hidden_BCLh = hidden_BCLh + self.age(newest.time_ms_BL, request.now_ms_B)[:, None]
        weight_BCL = self.unit(hidden_BCLh)[..., 0] * newest.weight_BL[:, None, :]
        return torch.einsum("bcl,blv->bcv", weight_BCL, self.value(event_BLd)), candidate_BCd.new_zeros(())

    def _pairs(self, candidate_BCd: torch.Tensor, event_BLd: torch.Tensor) -> torch.Tensor:
        """self.pair of (candidate, event, candidate * event, candidate - event), a part at a time: less to multiply."""
        target, event, product, difference = self.pair.weight.chunk(4, dim=1)
        alone_BCh = candidate_BCd @ (target + difference).T + self.pair.bias
        alone_BLh = event_BLd @ (event - difference).T
        joint_BCLh = (candidate_BCd[:, :, None, :] * event_BLd[:, None, :, :]) @ product.T
        return alone_BCh[:, :, None, :] + alone_BLh[:, None, :, :] + joint_BCLh


def din_with_time(shape: Shape) -> DinHistory:
    """DIN whose unit sees each event's age, so that it can weigh recent events more."""
    return DinHistory(shape, LogAge(HIDDEN))
