"""DIN's activation unit (arXiv 1706.06978, figure 2): a small network weighs each event for each candidate.

    h_ci  = A x_c + B e_i + P (x_c * e_i) + D (x_c - e_i) + b + a[bucket of i's age]      e_i = x_i + i's action
    w_ci  = u . PReLU(h_ci) + u_0
    out_c = sum_i weight_i w_ci V e_i

The weights are not normalised, as in the paper: that five events are like the candidate is more than that one is, which
no softmax says. The age is no input of the paper's unit; with it, what fades is what the candidate makes fade.

It is computed without a vector for each pair. What meets the candidate is one matrix of all events, whose rows are
A + D + P * e_i; and u . PReLU(h) = s u . h + (1 - s) u . max(h, 0), where the first term needs no h.

Shapes: B users, C candidates, L events, d model width, J hidden, V all value widths.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import nn
from torch.nn import functional

from models.checkpoint import Sizes
from models.request import History
from models.temporal import LogAge


class ActivationUnit(nn.Module):
    """The weighted sum of events; without `ages` the unit does not see how long ago they were."""

    def __init__(self, sizes: Sizes, actions: int, hidden: int, *, ages: bool) -> None:
        super().__init__()
        width = sizes.width
        self.age = LogAge(hidden) if ages else None
        self.action = nn.Embedding(actions, width)
        self.pair = nn.Linear(4 * width, hidden)
        self.unit = nn.Sequential(nn.PReLU(), nn.Linear(hidden, 1))
        self.value = nn.Linear(width, sizes.heads * sizes.value_width, bias=False)

    def seen(
        self,
        candidate_BCd: Float[torch.Tensor, "B C d"],
        item_BLd: Float[torch.Tensor, "B L d"],
        events: History,
        now_ms_B: Int64[torch.Tensor, "B"],
    ) -> Float[torch.Tensor, "B C V"]:
        """What each candidate sees of the events, whose items have these vectors. Zeros where there is no event.

        Retractions (negative weights) are read as absent.
        """
        event_BLd = item_BLd + self.action(events.action_BL)
        age_BLJ = None if self.age is None else self.age(events.time_ms_BL, now_ms_B)
        weight_BCL = self._weights(candidate_BCd, event_BLd, age_BLJ) * events.weight_BL.clamp(min=0)[:, None]
        return weight_BCL @ self.value(event_BLd)

    def folded(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A + D, P, B - D (J d each) and b (J)."""
        candidate_Jd, event_Jd, product_Jd, difference_Jd = self.pair.weight.chunk(4, dim=1)
        return candidate_Jd + difference_Jd, product_Jd, event_Jd - difference_Jd, self.pair.bias

    def last(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """s (1), u (J) and u_0 (1)."""
        slope, out_1J, bias = self.unit.parameters()
        return slope, out_1J[0], bias

    def _weights(
        self, candidate_BCd: torch.Tensor, event_BLd: torch.Tensor, age_BLJ: torch.Tensor | None
    ) -> Float[torch.Tensor, "B C L"]:
        meets_Jd, product_Jd, alone_Jd, bias_J = self.folded()
        meets_BLJd = meets_Jd + product_Jd * event_BLd[:, :, None]
        alone_BLJ = functional.linear(event_BLd, alone_Jd, bias_J)
        if age_BLJ is not None:
            alone_BLJ = alone_BLJ + age_BLJ
        slope, out_J, bias = self.last()
        hidden_BCX = _meet(candidate_BCd, meets_BLJd.flatten(1, 2), alone_BLJ.flatten(1))
        positive_BCLJ = hidden_BCX.relu().unflatten(-1, alone_BLJ.shape[1:])
        straight_J = slope * out_J
        straight_BCL = _meet(candidate_BCd, straight_J @ meets_BLJd, alone_BLJ @ straight_J)
        return straight_BCL + positive_BCLJ @ (out_J - straight_J) + bias


def _meet(x_BCd: torch.Tensor, matrix_BXd: torch.Tensor, bias_BX: torch.Tensor) -> torch.Tensor:
    """x_BCd times each user's matrix, and the user's bias beside it: B C X."""
    return torch.baddbmm(bias_BX[:, None], x_BCd, matrix_BXd.transpose(1, 2))
