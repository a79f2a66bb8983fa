"""TWIN (arXiv 2302.02352): target attention over the events that the very same attention finds most relevant.

    alpha = (K_h W^h)(W^q q) / sqrt(d_k) + (K_c W^c) beta        relevance, in the search as in the attention
    out   = W^o [ softmax(alpha over the top k by alpha) K W^v ]   per head, heads side by side

K = [K_h, K_c]: inherent features K_h (the item's vector, whose projection can be kept per item) and user-item cross
features K_c (action, age), each of which is pressed to one number by its own vector of W^c and weighed by beta. Each
head searches for itself, so what is lost of its softmax is the least that k events can lose.

Shapes: as in `models.ranker`; J cross features of X numbers, S finalists of the search.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional

from models.ranker import Shape
from models.rivals.events import EVENT_BYTES, item_vectors
from models.temporal import LogAge

FINALISTS = 100
CROSS_FEATURES = 2
CROSS_WIDTH = 8


class TwinHistory(nn.Module):
    """Softmax attention over each head's FINALISTS most relevant events."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sizes = shape.sizes
        self.heads, self.scale = sizes.heads, 1 / math.sqrt(sizes.key_width)
        self.query = nn.Linear(sizes.width, sizes.heads * sizes.key_width, bias=False)
        self.key = nn.Linear(sizes.width, sizes.heads * sizes.key_width, bias=False)
        self.query.weight.data.copy_(self.key.weight.data)
        self.action = nn.Embedding(shape.actions, CROSS_WIDTH)
        self.age = LogAge(CROSS_WIDTH)
        self.cross_HJX = nn.Parameter(torch.randn(sizes.heads, CROSS_FEATURES, CROSS_WIDTH) * CROSS_WIDTH**-0.5)
        self.beta_J = nn.Parameter(torch.ones(CROSS_FEATURES))
        # W^v in two parts: for the inherent and for the cross features.
        values = sizes.heads * sizes.value_width
        self.value = nn.Linear(sizes.width, values, bias=False)
        self.cross_value = nn.Linear(CROSS_FEATURES * CROSS_WIDTH, values, bias=False)
        self.out = nn.Linear(values, values, bias=False)
        # The head compares what is seen with the candidate number by number, so both start in the same space.
        nn.init.eye_(self.out.weight)

    def user_bytes(self, length: int) -> int:
        """Every event has to be at hand, for any of them may be near a candidate."""
        return length * EVENT_BYTES

    def forward(self, candidate_BCd, encoder, request):
        history = request.history
        inherent_BLd = item_vectors(encoder, history.item_BL)
        age_BLX = self.age(history.time_ms_BL, request.now_ms_B)
        cross_BLJX = torch.stack([self.action(history.action_BL), age_BLX], dim=2)
        alpha_BHCL = self._relevance(candidate_BCd, inherent_BLd, cross_BLJX)
        alpha_BHCL = alpha_BHCL.masked_fill(history.weight_BL[:, None, None, :] <= 0, -math.inf)
        value_BLV = self.value(inherent_BLd) + self.cross_value(cross_BLJX.flatten(2))
        seen_BCHD = _search_and_attend(alpha_BHCL, value_BLV.unflatten(-1, (self.heads, -1)))
        return self.out(seen_BCHD.flatten(2)), candidate_BCd.new_zeros(())

    def _relevance(self, candidate_BCd, inherent_BLd, cross_BLJX) -> torch.Tensor:
        """Alpha, B H C L."""
        query_BCHE = self.query(candidate_BCd).unflatten(-1, (self.heads, -1))
        key_BLHE = self.key(inherent_BLd).unflatten(-1, (self.heads, -1))
        bias_BHL = torch.einsum("bljx,hjx,j->bhl", cross_BLJX, self.cross_HJX, self.beta_J)
        return torch.einsum("bche,blhe->bhcl", query_BCHE, key_BLHE) * self.scale + bias_BHL[:, :, None, :]


def _search_and_attend(alpha_BHCL: torch.Tensor, value_BLHD: torch.Tensor) -> torch.Tensor:
    """Softmax over the FINALISTS highest alphas, times their values; zeros where all are -inf. Returns B C H D."""
    batch, heads, _, length = alpha_BHCL.shape
    alpha_BHCS, at_BHCS = alpha_BHCL.topk(min(FINALISTS, length), dim=-1)
    nothing_BHC1 = ~alpha_BHCS[..., :1].isfinite()
    weight_BHCS = torch.softmax(torch.where(nothing_BHC1, 0.0, alpha_BHCS), dim=-1)
    first_BH11 = (torch.arange(batch * heads, device=at_BHCS.device) * length).view(batch, heads, 1, 1)
    value_BHCSD = functional.embedding(at_BHCS + first_BH11, value_BLHD.transpose(1, 2).flatten(0, 2))
    seen_BHCD = torch.einsum("bhcs,bhcsd->bhcd", weight_BHCS, value_BHCSD)
    return torch.where(nothing_BHC1, 0.0, seen_BHCD).transpose(1, 2)
