"""What rivals have of an event: the vector of its item, and its bytes.

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


def item_vectors(encoder: nn.Module, item_BL: Int64[torch.Tensor, "B L"]) -> Float[torch.Tensor, "B L d"]:
    """The events' item vectors; each distinct item is encoded once, as VQL does it."""
    item_U, at_BL = torch.unique(item_BL, return_inverse=True)
    return functional.embedding(at_BL, encoder(item_U))
