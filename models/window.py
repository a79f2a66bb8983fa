"""The short exact window: the newest events one by one, each weighed by an activation unit, beside the cache.

    window(x) = sum_i weight_i w(x, e_i, now - t_i) V e_i          w: models.activation_unit

over the newest L events of the user (`models.newest`), with vectors of actions and values of its own. What the user is
after right now is a matter of the last few events (DIN, arXiv 1706.06978, reads only these). The unit is the branch's
kernel, which need not be separable where the events are at hand, and its gate: it says for each candidate, event and
age how much is added to what the cache's branch sees, less than nothing too.

Shapes: as in `models.attention`; d model width.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64

from models.activation_unit import ActivationUnit
from models.attention import CacheBatch
from models.checkpoint import Sizes
from models.request import History, TimelineBatch

HIDDEN = 16


class Window(ActivationUnit):
    """The branch."""

    def __init__(self, sizes: Sizes, actions: int) -> None:
        super().__init__(sizes, actions, HIDDEN, ages=True)
        self.sizes = sizes

    def forward(
        self,
        candidate_BCd: Float[torch.Tensor, "B C d"],
        event_BLd: Float[torch.Tensor, "B L d"],
        newest: History,
        now_ms_B: Int64[torch.Tensor, "B"],
    ) -> Float[torch.Tensor, "B C H D"]:
        """What is added for each candidate, from the vectors of the events' items. Zeros where there is no event."""
        return self.seen(candidate_BCd, event_BLd, newest, now_ms_B).unflatten(-1, (self.sizes.heads, -1))

    def newest_in(self, cache: CacheBatch) -> History:
        """What it reads of caches. Raises ValueError for caches that were made for a window of another size."""
        found = cache.newest_item_BL.shape[1]
        if found != self.sizes.newest:
            raise ValueError(f"caches with the newest {found} events for a window over {self.sizes.newest}")
        return cache.newest


def newest_before(batch: TimelineBatch, length: int) -> tuple[Int64[torch.Tensor, "B L"], History]:
    """The events max(first, end - length):end of each impression: their places among the batch's, and themselves."""
    place_BL = batch.end_B[:, None] + torch.arange(-length, 0, device=batch.end_B.device)
    real_BL = place_BL >= batch.first_B[:, None]
    place_BL = torch.where(real_BL, place_BL, 0)
    newest = History(
        item_BL=batch.item_M[place_BL],
        action_BL=batch.action_M[place_BL],
        time_ms_BL=batch.time_ms_M[place_BL],
        weight_BL=torch.where(real_BL, batch.weight_M[place_BL], 0.0),
    )
    return place_BL, newest
