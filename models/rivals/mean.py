"""Mean pooling (as in YouTube's ranker, RecSys 2016): every candidate sees the same mean of all events."""

from __future__ import annotations

import torch
from torch import nn

from models.ranker import Shape
from models.rivals.events import item_vectors


class MeanHistory(nn.Module):
    """sum_i w_i W (x_i + a_i) / sum_i w_i, over the item vectors x and action vectors a of all events."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.sizes.width
        self.action = nn.Embedding(shape.actions, width)
        self.value = nn.Linear(width, shape.sizes.heads * shape.sizes.value_width, bias=False)

    def user_bytes(self, length: int) -> int:
        """The sum of vectors and of weights as float32, whatever the length."""
        return 4 * (self.action.embedding_dim + 1)

    def forward(self, candidate_BCd, encoder, request):
        history = request.history
        event_BLd = item_vectors(encoder, history.item_BL) + self.action(history.action_BL)
        # Retractions (negative weights) are read as absent, as VQL reads them.
        weight_BL = history.weight_BL.clamp(min=0)
        share_BL = weight_BL / weight_BL.sum(dim=1, keepdim=True).clamp(min=1e-9)
        mean_BV = self.value(torch.einsum("bl,bld->bd", share_BL, event_BLd))
        return mean_BV[:, None, :].expand(-1, candidate_BCd.shape[1], -1), candidate_BCd.new_zeros(())
