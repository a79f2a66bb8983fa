"""SDIM (arXiv 2205.10249): what hashes like the candidate, summed; no event is looked at when a candidate is scored.

    sig_g(x) = the sides of x of tau random hyperplanes, in each of G = m / tau rounds
    o        = 1/G sum_g l2( sum over i with sig_g(s_i) = sig_g(q) of w_i e_i ),   l2(x) = x / |x|

So a user's history is G x 2**tau vectors of unit length, one for each signature of each round: 8 KB as float16 in the
sizes of the paper (m = 48, tau = 3) and vectors of 32. Hashes are of item vectors; e_i is the item's vector and its
action. The planes are drawn once and kept with the parameters. No time enters.

Shapes: as in models.ranker; G rounds, S = G * 2**tau buckets.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

from models.ranker import Shape
from models.rivals.simhash import sides

ROUNDS, ROUND_BITS = 16, 3
BUCKETS = ROUNDS << ROUND_BITS


class SdimHistory(nn.Module):
    """The mean, over rounds, of the bucket that the candidate is in."""

    plane_dm: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        width = shape.sizes.width
        self.action = nn.Embedding(shape.actions, width)
        self.value = nn.Linear(width, shape.sizes.heads * shape.sizes.value_width, bias=False)
        self.register_buffer("plane_dm", torch.randn(width, ROUNDS * ROUND_BITS))

    def user_bytes(self, length: int) -> int:
        """The buckets as float16, whatever the length."""
        return BUCKETS * self.action.embedding_dim * 2

    def forward(self, candidate_BCd, encoder, request):
        history = request.history
        bucket_BSd = self.buckets(encoder(history.item_BL), history.action_BL, history.weight_BL)
        return self.read(self.places(candidate_BCd), bucket_BSd), candidate_BCd.new_zeros(())

    def places(self, x_Nd: Float[torch.Tensor, "*N d"]) -> Int64[torch.Tensor, "*N G"]:
        """The bucket of a vector in each round."""
        bit_NGt = sides(x_Nd, self.plane_dm).unflatten(-1, (ROUNDS, ROUND_BITS))
        of_bit_t = 1 << torch.arange(ROUND_BITS, device=x_Nd.device)
        first_G = torch.arange(ROUNDS, device=x_Nd.device) << ROUND_BITS
        return (bit_NGt * of_bit_t).sum(dim=-1) + first_G

    def buckets(
        self,
        x_BLd: Float[torch.Tensor, "B L d"],
        action_BL: Int64[torch.Tensor, "B L"],
        weight_BL: Float[torch.Tensor, "B L"],
    ) -> Float[torch.Tensor, "B S d"]:
        """A history as its buckets, each of length 1 (0 when empty): what a server keeps of a user."""
        share_BLS = x_BLd.new_zeros(*x_BLd.shape[:2], BUCKETS)
        share_BLS.scatter_(-1, self.places(x_BLd), weight_BL[..., None].expand(-1, -1, ROUNDS))
        event_BLd = x_BLd + self.action(action_BL)
        return functional.normalize(share_BLS.transpose(1, 2) @ event_BLd, dim=-1)

    def read(
        self, place_BCG: Int64[torch.Tensor, "B C G"], bucket_BSd: Float[torch.Tensor, "B S d"]
    ) -> Float[torch.Tensor, "B C V"]:
        """What each candidate sees, from its own buckets' places and the user's buckets."""
        users, candidates = place_BCG.shape[:2]
        start_B = torch.arange(users, device=place_BCG.device) * BUCKETS
        place_NG = (place_BCG + start_B[:, None, None]).flatten(0, 1)
        mean_Nd = functional.embedding_bag(place_NG, bucket_BSd.flatten(0, 1), mode="mean")
        return self.value(mean_Nd.unflatten(0, (users, candidates)))
