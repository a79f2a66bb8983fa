"""No history at all: what the candidate's own context can tell. The floor of every comparison."""

from __future__ import annotations

from torch import nn

from models.ranker import Shape


class NoHistory(nn.Module):
    """Every candidate sees zeros."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.width = shape.sizes.heads * shape.sizes.value_width

    def user_bytes(self, length: int) -> int:
        """Nothing."""
        return 0

    def forward(self, candidate_BCd, encoder, request):
        return candidate_BCd.new_zeros(*candidate_BCd.shape[:2], self.width), candidate_BCd.new_zeros(())
