"""The grouped key codebook: straight-through keys, k-means++ start, EMA updates, revival of dead codewords.

Each group of heads has its own K codewords for the group's joint key. During the first part of training keys stay
exact; `start` then places the codewords and from there on every key is replaced by its nearest codeword, with the
gradient passed straight through (Transformer-VQ, 2309.16354). The codewords follow an exponential moving average of
the keys that chose them. In evaluation nothing changes: a checkpoint's codes are fixed.

The codes of group 0 may be given instead, `given_N`: its codewords are the means of the keys that are given them, which
move in the same way, and none of them is revived.

Shapes: N keys, G groups, K codewords per group, F width of a group's joint key.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

DECAY = 0.99
DEAD_SHARE = 0.02
LEAST_USAGE = 1e-9
# Keys whose products with all codewords stay in a core's cache.
KEYS_AT_ONCE = 1_024


class Codebook(nn.Module):
    """K codewords for each of G groups, with the running sums that move them."""

    codeword_GKF: torch.Tensor
    usage_GK: torch.Tensor
    total_GKF: torch.Tensor
    started: torch.Tensor

    def __init__(self, groups: int, codewords: int, key_width: int) -> None:
        super().__init__()
        self.register_buffer("codeword_GKF", torch.zeros(groups, codewords, key_width))
        self.register_buffer("usage_GK", torch.zeros(groups, codewords))
        self.register_buffer("total_GKF", torch.zeros(groups, codewords, key_width))
        self.register_buffer("started", torch.tensor(False))

    def encode(
        self, key_NGF: Float[torch.Tensor, "N G F"], given_N: Int64[torch.Tensor, "N"] | None = None
    ) -> Int64[torch.Tensor, "N G"]:
        """The nearest codeword of each group's key; of group 0 what is given."""
        with torch.no_grad(), torch.autocast(key_NGF.device.type, enabled=False):
            # The nearest has the largest product less half its square: with a column of ones that is one product.
            half_GK1 = self.codeword_GKF.square().sum(dim=-1, keepdim=True) / 2
            codeword_GXK = torch.cat([self.codeword_GKF, -half_GK1], dim=-1).transpose(1, 2)
            key_GNX = functional.pad(key_NGF, (0, 1), value=1.0).transpose(0, 1)
            # `max` finds a place in a third of the time of `argmax`.
            pieces = [(some @ codeword_GXK).max(dim=-1).indices for some in key_GNX.split(KEYS_AT_ONCE, dim=1)]
            code_NG = torch.cat(pieces, dim=1).T.contiguous()
            if given_N is not None:
                code_NG[:, 0] = given_N
            return code_NG

    def decode(self, code_NG: Int64[torch.Tensor, "N G"]) -> Float[torch.Tensor, "N G F"]:
        """The codewords of the codes."""
        groups = torch.arange(self.codeword_GKF.shape[0], device=code_NG.device)
        return self.codeword_GKF[groups, code_NG]

    def forward(
        self, key_NGF: Float[torch.Tensor, "N G F"], given_N: Int64[torch.Tensor, "N"] | None = None
    ) -> tuple[Float[torch.Tensor, "N G F"], Float[torch.Tensor, ""]]:
        """Quantised keys with straight-through gradient, and the commitment error (mean over all elements)."""
        if not self.started:
            return key_NGF, key_NGF.new_zeros(())
        return self.straight_through(key_NGF, self.encode(key_NGF, given_N))

    def straight_through(
        self, key_NGF: Float[torch.Tensor, "N G F"], code_NG: Int64[torch.Tensor, "N G"]
    ) -> tuple[Float[torch.Tensor, "N G F"], Float[torch.Tensor, ""]]:
        """What `forward` returns, for keys whose codes are known."""
        quantised_NGF = self.decode(code_NG)
        commitment = (key_NGF - quantised_NGF).square().mean()
        return key_NGF + (quantised_NGF - key_NGF).detach(), commitment

    @torch.no_grad()
    def start(
        self, key_NGF: torch.Tensor, generator: torch.Generator, sweeps: int = 5, given_N: torch.Tensor | None = None
    ) -> None:
        """Place the codewords by k-means++ and a few Lloyd sweeps over a sample of keys.

        Codes that are given, but to no key of the sample, have the mean of all until they are met.
        """
        self.codeword_GKF.copy_(key_NGF.mean(dim=0)[:, None])
        for g in range(0 if given_N is None else 1, key_NGF.shape[1]):
            self.codeword_GKF[g] = _spread(key_NGF[:, g], self.codeword_GKF.shape[1], generator)
        weight_N = key_NGF.new_ones(len(key_NGF))
        count_GK = self.usage_GK
        for _ in range(sweeps):
            count_GK, sum_GKF = self._assign(key_NGF, weight_N, given_N)
            used = count_GK > 0
            self.codeword_GKF[used] = sum_GKF[used] / count_GK[used][:, None]
        self.usage_GK.copy_(count_GK)
        self.total_GKF.copy_(self.codeword_GKF * count_GK[..., None])
        self.started.fill_(True)

    @torch.no_grad()
    def update(
        self,
        key_NGF: torch.Tensor,
        weight_N: torch.Tensor,
        generator: torch.Generator,
        given_N: torch.Tensor | None = None,
    ) -> None:
        """One EMA step towards the keys (each counted weight_N times); dead codewords restart at random keys."""
        if not self.started:
            return
        count_GK, sum_GKF = self._assign(key_NGF, weight_N, given_N)
        self.usage_GK.mul_(DECAY).add_(count_GK, alpha=1 - DECAY)
        self.total_GKF.mul_(DECAY).add_(sum_GKF, alpha=1 - DECAY)
        mean_usage_G1 = self.usage_GK.mean(dim=1, keepdim=True)
        dead_GK = self.usage_GK < DEAD_SHARE * mean_usage_G1
        if given_N is not None:
            dead_GK[0] = False
        for g, k in dead_GK.nonzero().tolist():
            n = int(torch.randint(len(key_NGF), (1,), generator=generator))
            self.usage_GK[g, k] = mean_usage_G1[g, 0]
            self.total_GKF[g, k] = key_NGF[n, g] * mean_usage_G1[g, 0]
        # A codeword that no key has had for long stays where it is, until its sums are more than rounding again.
        used_GK = self.usage_GK > LEAST_USAGE
        self.codeword_GKF[used_GK] = self.total_GKF[used_GK] / self.usage_GK[used_GK][:, None]

    def _assign(
        self, key_NGF: torch.Tensor, weight_N: torch.Tensor, given_N: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        code_NG = self.encode(key_NGF, given_N)
        count_GK = torch.zeros_like(self.usage_GK)
        sum_GKF = torch.zeros_like(self.total_GKF)
        for g in range(key_NGF.shape[1]):
            count_GK[g].index_add_(0, code_NG[:, g], weight_N)
            sum_GKF[g].index_add_(0, code_NG[:, g], key_NGF[:, g] * weight_N[:, None])
        return count_GK, sum_GKF


def _spread(key_NF: torch.Tensor, codewords: int, generator: torch.Generator) -> torch.Tensor:
    """k-means++: each next centre is drawn with probability proportional to its squared distance to the others."""
    chosen = [int(torch.randint(len(key_NF), (1,), generator=generator))]
    distance_N = (key_NF - key_NF[chosen[0]]).square().sum(dim=1)
    while len(chosen) < codewords:
        # The floor lets a sample with fewer distinct keys than codewords repeat itself instead of failing.
        chosen.append(int(torch.multinomial(distance_N.cpu() + 1e-12, 1, generator=generator)))
        distance_N = torch.minimum(distance_N, (key_NF - key_NF[chosen[-1]]).square().sum(dim=1))
    return key_NF[chosen]
