"""Exact attention over the whole history, trained end to end: what VQL approximates, and its upper reference.

Projections, layer norms, temperature, temporal kernel and values are VQL's own; only no key is ever quantised.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from models.ranker import Shape, VqlHistory
from models.request import Request
from models.rivals.events import EVENT_BYTES


class FullHistory(nn.Module):
    """VQL's attention with exact keys: the training loop starts only the codebook of a `VqlHistory` itself."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.attention = VqlHistory(shape.without_window())

    @property
    def value(self) -> nn.Linear:
        """Where the candidate's own projection starts."""
        return self.attention.value

    @property
    def told(self) -> int:
        """What its head is given beside what candidates see."""
        return self.attention.told

    def standardise_mass(self, requests: Iterable[Request]) -> None:
        """As VQL's."""
        self.attention.standardise_mass(requests)

    def user_bytes(self, length: int) -> int:
        """Every event."""
        return length * EVENT_BYTES

    def forward(self, candidate_BCd, encoder, request):
        return self.attention(candidate_BCd, encoder, request)
