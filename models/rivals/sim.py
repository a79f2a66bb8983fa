"""SIM with hard search (arXiv 2006.05639): target attention over the newest events of the candidate's own category.

    S_q = the k newest i with category(i) = category(q)
    z_i = e_i + t_i, t_i an embedding of how long ago;   o = MultiHead(q, z, z)

The category is the second field of an item; where an item has no other field than its id, it is the id. The paper
concatenates time and item before a linear layer; here they are added, as the fields of an item and its action are.
"""

from __future__ import annotations

import torch
from torch import nn

from models.ranker import Shape
from models.rivals.events import EVENT_BYTES
from models.rivals.target_attention import TargetAttention, take

NEWEST = 50
HOUR_MS = 3_600_000
# Of the n-th age, events are 2**n - 1 to 2**(n + 1) - 1 hours old; the last one is of all that are older than 60 years.
AGES = 20


class SimHistory(nn.Module):
    """Attention over the NEWEST events of the candidate's category."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.category_field = min(1, len(shape.field_rows) - 1)
        self.action = nn.Embedding(shape.actions, shape.sizes.width)
        self.age = nn.Embedding(AGES, shape.sizes.width)
        self.attention = TargetAttention(shape.sizes)

    @property
    def value(self) -> nn.Linear:
        return self.attention.value

    def user_bytes(self, length: int) -> int:
        """Every event has to be at hand, for any of them may be near a candidate."""
        return length * EVENT_BYTES

    def forward(self, candidate_BCd, encoder, request):
        history = request.history
        category_M = encoder.feature_MF[:, self.category_field]
        same_BCL = category_M[request.candidate_BC][:, :, None] == category_M[history.item_BL][:, None, :]
        at_BCk, found_BCk = _newest(same_BCL & (history.weight_BL > 0)[:, None, :])
        weight_BCk = torch.where(found_BCk, take(history.weight_BL[..., None], at_BCk)[..., 0], 0.0)
        age_BL = ages(request.now_ms_B[:, None] - history.time_ms_BL)
        event_BLd = encoder(history.item_BL) + self.action(history.action_BL) + self.age(age_BL)
        return self.attention(candidate_BCd, event_BLd, at_BCk, weight_BCk), candidate_BCd.new_zeros(())


def ages(age_ms: torch.Tensor) -> torch.Tensor:
    """Which of the AGES; an event of the future is as one of now."""
    hours = age_ms.clamp(min=0).double() / HOUR_MS
    return (hours + 1).log2().long().clamp(max=AGES - 1)


def _newest(wanted_BCL: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Places of the newest wanted events (B C k), and whether there was one: places are filled up with others."""
    length = wanted_BCL.shape[-1]
    place_L = torch.arange(length, device=wanted_BCL.device)
    found = torch.where(wanted_BCL, place_L, place_L - length).topk(min(NEWEST, length))
    return found.indices, found.values >= 0
