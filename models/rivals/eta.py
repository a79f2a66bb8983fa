"""ETA (arXiv 2108.04468): target attention over the events whose SimHash is nearest to the candidate's.

    h(x) = sign(x R), R of random Gaussian columns; the k events of least Hamming distance |h(q) - h(s_i)|
    o    = MultiHead(q, S_k, S_k)

Hashes are of item vectors, so they change as the encoder learns; R is drawn once and kept with the parameters. Of
equally near events the newest are taken. Events are the items' vectors and their actions. No time enters.
"""

from __future__ import annotations

import torch
from torch import nn

from models.ranker import Shape
from models.rivals.events import EVENT_BYTES
from models.rivals.simhash import WORD, nearest, sides
from models.rivals.target_attention import TargetAttention, take

NEAREST = 50


class EtaHistory(nn.Module):
    """Attention over the NEAREST events."""

    plane_dm: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.action = nn.Embedding(shape.actions, shape.sizes.width)
        self.attention = TargetAttention(shape.sizes)
        self.register_buffer("plane_dm", torch.randn(shape.sizes.width, WORD))

    @property
    def value(self) -> nn.Linear:
        return self.attention.value

    def user_bytes(self, length: int) -> int:
        """Every event has to be at hand, for any of them may be near a candidate."""
        return length * EVENT_BYTES

    def forward(self, candidate_BCd, encoder, request):
        history = request.history
        x_BLd = encoder(history.item_BL)
        candidate_BCm, event_BLm = sides(candidate_BCd, self.plane_dm), sides(x_BLd, self.plane_dm)
        at_BCk = nearest(candidate_BCm, event_BLm, history.weight_BL, NEAREST)
        weight_BCk = take(history.weight_BL[..., None], at_BCk)[..., 0]
        event_BLd = x_BLd + self.action(history.action_BL)
        return self.attention(candidate_BCd, event_BLd, at_BCk, weight_BCk), candidate_BCd.new_zeros(())
