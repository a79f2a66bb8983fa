"""What rivals see of an event beside its action and weight: the vector of its item, and its age.

Shapes: as in `models.ranker`; U distinct items of a batch.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

from models.wire import RECENT

# A raw event as a row of the cache holds it.
EVENT_BYTES = RECENT.itemsize
# Half octaves from a second: the last bucket begins at 96 years.
AGE_BUCKETS = 64


def item_vectors(encoder: nn.Module, item_BL: Int64[torch.Tensor, "B L"]) -> Float[torch.Tensor, "B L d"]:
    """The events' item vectors; each distinct item is encoded once, as VQL does it."""
    item_U, at_BL = torch.unique(item_BL, return_inverse=True)
    return functional.embedding(at_BL, encoder(item_U))


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
