"""The temporal kernel with its learned weights: how much less an older event counts."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from models.attention import Kernel
from models.cache import decay_rates


class TemporalKernel(nn.Module):
    """kappa_h(dt) = sum_r a_hr exp(-lambda_hr dt) with learned a > 0 (softplus) and fixed half-lives."""

    rate_HR: torch.Tensor

    def __init__(self, half_life_ms: Sequence[Sequence[float | None]]) -> None:
        super().__init__()
        self.register_buffer("rate_HR", torch.from_numpy(decay_rates(half_life_ms)), persistent=False)
        self.raw_HR = nn.Parameter(torch.full(self.rate_HR.shape, math.log(math.e - 1.0)))

    def forward(self) -> Kernel:
        return Kernel(log_weight_HR=functional.softplus(self.raw_HR).log(), rate_HR=self.rate_HR)
