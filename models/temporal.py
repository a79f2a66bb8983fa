"""How much less an older event counts: the separable kernel with its learned weights, and ages as buckets.

Shapes: B users, L events.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

from models.attention import Kernel
from models.cache import decay_rates

# Half octaves from a second: the last bucket begins at 96 years.
AGE_BUCKETS = 64


class TemporalKernel(nn.Module):
    """kappa_h(dt) = sum_r a_hr exp(-lambda_hr dt) with learned a > 0 (softplus) and fixed half-lives."""

    rate_HR: torch.Tensor

    def __init__(self, half_life_ms: Sequence[Sequence[float | None]]) -> None:
        super().__init__()
        self.register_buffer("rate_HR", torch.from_numpy(decay_rates(half_life_ms)), persistent=False)
        self.raw_HR = nn.Parameter(torch.full(self.rate_HR.shape, math.log(math.e - 1.0)))

    def forward(self) -> Kernel:
        return Kernel(log_weight_HR=functional.softplus(self.raw_HR).log(), rate_HR=self.rate_HR)


class LogAge(nn.Module):
    """An embedding of how long ago an event was, in buckets of half an octave."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bucket = nn.Embedding(AGE_BUCKETS, width)
        nn.init.normal_(self.bucket.weight, std=0.1)

    def forward(
        self, time_ms_BL: Int64[torch.Tensor, "B L"], now_ms_B: Int64[torch.Tensor, "B"]
    ) -> Float[torch.Tensor, "B L width"]:
        return self.bucket(age_bucket(now_ms_B[:, None] - time_ms_BL))


def age_bucket(age_ms: Int64[torch.Tensor, "*N"]) -> Int64[torch.Tensor, "*N"]:
    """floor(2 log2(1 + age in seconds)), within AGE_BUCKETS."""
    octaves = torch.log2(1 + age_ms.clamp(min=0).double() / 1000)
    return (2 * octaves).long().clamp(max=AGE_BUCKETS - 1)
