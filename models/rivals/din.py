"""DIN (arXiv 1706.06978): the newest events alone, each weighed by a small network (`models.activation_unit`).

Time enters only where the unit sees the event's age too (`din_with_time`).
"""

from __future__ import annotations

from models.activation_unit import ActivationUnit
from models.ranker import Shape
from models.rivals.events import EVENT_BYTES

WINDOW = 50
HIDDEN = 36


class DinHistory(ActivationUnit):
    """The weighted sum of the newest WINDOW events."""

    def __init__(self, shape: Shape, *, ages: bool = False) -> None:
        super().__init__(shape.sizes, shape.actions, HIDDEN, ages=ages)

    def user_bytes(self, length: int) -> int:
        """The newest events."""
        return min(length, WINDOW) * EVENT_BYTES

    def forward(self, candidate_BCd, encoder, request):
        newest = request.history.newest(WINDOW)
        seen_BCV = self.seen(candidate_BCd, encoder(newest.item_BL), newest, request.now_ms_B)
        return seen_BCV, candidate_BCd.new_zeros(())


def din_with_time(shape: Shape) -> DinHistory:
    """DIN whose unit sees each event's age, so that it can weigh recent events more."""
    return DinHistory(shape, ages=True)
