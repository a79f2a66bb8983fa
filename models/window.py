"""The short exact window: attention over the newest events one by one, with keys as they are, beside the cache.

    window_h(x) = g_h(x) sum_i softmax_i(tau_h q_h(x) . k_hi + log(w_i kappa_h(now - t_i))) v_hi
    g_h(x)      = sigmoid(a_h . x + b_h)

over the newest L events of the user (`models.newest`), with projections, temperature, kernel and values of actions of
its own. The gate says for each candidate and head how much of it is added to what the cache's branch sees. Half-lives
are shorter than the cache's: what the user is after right now is a matter of the last few events (DIN, arXiv
1706.06978, reads only these).

Shapes: as in `models.attention`; d model width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

from models.attention import CacheBatch, history_bias, normed_heads, read_history, scaled_queries
from models.checkpoint import Sizes
from models.request import History, TimelineBatch
from models.temporal import TemporalKernel


class Candidates(NamedTuple):
    """What the window needs of candidates: queries, already scaled by tau, and gates from 0 to 1."""

    query_BCHE: Float[torch.Tensor, "B C H E"]
    gate_BCH: Float[torch.Tensor, "B C H"]


class Window(nn.Module):
    """The branch, with a half-life or several for each head."""

    def __init__(self, sizes: Sizes, half_life_ms: Sequence[Sequence[float | None]], actions: int) -> None:
        super().__init__()
        self.sizes = sizes
        self.key = nn.Linear(sizes.width, sizes.heads * sizes.key_width, bias=False)
        self.query = nn.Linear(sizes.width, sizes.heads * sizes.key_width, bias=False)
        self.query.weight.data.copy_(self.key.weight.data)
        self.value = nn.Linear(sizes.width, sizes.heads * sizes.value_width, bias=False)
        self.action_value_AHD = nn.Parameter(torch.zeros(actions, sizes.heads, sizes.value_width))
        self.log_temperature_H = nn.Parameter(torch.zeros(sizes.heads))
        self.kernel = TemporalKernel(half_life_ms)
        self.gate = nn.Linear(sizes.width, sizes.heads)

    def forward(
        self,
        candidate_BCd: Float[torch.Tensor, "B C d"],
        event_BLd: Float[torch.Tensor, "B L d"],
        newest: History,
        now_ms_B: Int64[torch.Tensor, "B"],
    ) -> Float[torch.Tensor, "B C H D"]:
        """What is added for each candidate, from the vectors of the events' items. Zeros where there is no event."""
        asked = self.candidates(candidate_BCd)
        return self.read(asked, self.keys(event_BLd), self.values(event_BLd), newest, now_ms_B)

    def read(
        self,
        asked: Candidates,
        key_BLHE: Float[torch.Tensor, "B L H E"],
        value_BLHD: Float[torch.Tensor, "B L H D"],
        newest: History,
        now_ms_B: Int64[torch.Tensor, "B"],
    ) -> Float[torch.Tensor, "B C H D"]:
        """The same where queries, gates, and keys and values of the events' items are known."""
        value_BLHD = self.with_actions(value_BLHD, newest)
        bias_BHL = history_bias(self.kernel(), newest.time_ms_BL, newest.weight_BL, now_ms_B)
        return asked.gate_BCH[..., None] * read_history(asked.query_BCHE, key_BLHE, value_BLHD, bias_BHL)

    def with_actions(self, value_BLHD: Float[torch.Tensor, "B L H D"], newest: History) -> torch.Tensor:
        """The values of events, from those of their items."""
        of_action_BLX = functional.embedding(newest.action_BL, self.action_value_AHD.flatten(1))
        return value_BLHD + of_action_BLX.unflatten(-1, value_BLHD.shape[2:])

    def newest_in(self, cache: CacheBatch) -> History:
        """What it reads of caches. Raises ValueError for caches that were made for a window of another size."""
        found = cache.newest_item_BL.shape[1]
        if found != self.sizes.newest:
            raise ValueError(f"caches with the newest {found} events for a window over {self.sizes.newest}")
        return cache.newest

    def candidates(self, x_BCd: Float[torch.Tensor, "B C d"]) -> Candidates:
        """Layer-normed and scaled queries, and gates."""
        return Candidates(scaled_queries(self.query(x_BCd), self.log_temperature_H), self.gate(x_BCd).sigmoid())

    def keys(self, x_Nd: Float[torch.Tensor, "*N d"]) -> Float[torch.Tensor, "*N H E"]:
        """Layer-normed keys."""
        return normed_heads(self.key(x_Nd), self.sizes.heads)

    def values(self, x_Nd: Float[torch.Tensor, "*N d"]) -> Float[torch.Tensor, "*N H D"]:
        """The part of the values that items have; actions have the other."""
        return self.value(x_Nd).unflatten(-1, (self.sizes.heads, self.sizes.value_width))


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
