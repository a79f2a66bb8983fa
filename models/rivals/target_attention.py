"""Target attention over the few events that were found for each candidate: the second stage of SIM and ETA.

    o_h = sum_i softmax_i(q_h . k_hi / sqrt(E) + log w_i) v_hi

with the candidate as the query, and events as keys and values (multi-head attention, arXiv 1706.03762). Events are
weighted as VQL's are: a repeat counts as two events do, and weight 0 is no event.

Shapes: B users, C candidates, k events found for a candidate, L events of the history, H heads, E key width per head,
V = H * D all value widths.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

from models.checkpoint import Sizes


class TargetAttention(nn.Module):
    """Candidates' attention over their own events."""

    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.query = nn.Linear(sizes.width, sizes.heads * sizes.key_width, bias=False)
        self.key = nn.Linear(sizes.width, sizes.heads * sizes.key_width, bias=False)
        self.value = nn.Linear(sizes.width, sizes.heads * sizes.value_width, bias=False)
        self.query.weight.data.copy_(self.key.weight.data)

    def forward(
        self,
        candidate_BCd: Float[torch.Tensor, "B C d"],
        event_BLd: Float[torch.Tensor, "B L d"],
        at_BCk: Int64[torch.Tensor, "B C k"],
        weight_BCk: Float[torch.Tensor, "B C k"],
    ) -> Float[torch.Tensor, "B C V"]:
        """What each candidate sees of the events at its places; zeros where none of them has a positive weight."""
        key_BLX, value_BLV = self.key(event_BLd), self.value(event_BLd)
        return self.attend(candidate_BCd, take(key_BLX, at_BCk), take(value_BLV, at_BCk), weight_BCk)

    def attend(
        self,
        candidate_BCd: Float[torch.Tensor, "B C d"],
        key_BCkX: Float[torch.Tensor, "B C k X"],
        value_BCkV: Float[torch.Tensor, "B C k V"],
        weight_BCk: Float[torch.Tensor, "B C k"],
    ) -> Float[torch.Tensor, "B C V"]:
        """The same from keys (X = H * E) and values that were gathered already."""
        users, candidates, count = weight_BCk.shape
        nothing_BC = (weight_BCk <= 0).all(dim=-1)

        def by_head(x: torch.Tensor, length: int) -> torch.Tensor:
            return x.view(users * candidates, length, self.sizes.heads, -1).transpose(1, 2)

        out_NH1D = functional.scaled_dot_product_attention(
            by_head(self.query(candidate_BCd), 1),
            by_head(key_BCkX, count),
            by_head(value_BCkV, count),
            attn_mask=weight_BCk.clamp(min=0).log().view(-1, 1, 1, count),
        )
        return torch.where(nothing_BC[..., None], 0.0, out_NH1D.reshape(users, candidates, -1))


def take(event_BLX: Float[torch.Tensor, "B L X"], at_BCk: Int64[torch.Tensor, "B C k"]) -> torch.Tensor:
    """Each user's rows at these places (B C k X), as an embedding: its gradient is summed faster than indexing's."""
    users, length = event_BLX.shape[:2]
    start_B = torch.arange(users, device=at_BCk.device) * length
    return functional.embedding(at_BCk + start_B[:, None, None], event_BLX.flatten(0, 1))
