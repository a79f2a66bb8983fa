"""The states of timelines: the entries of `cache`, at the places where impressions need them, with gradients to values.

A state holds the masses and the sums of values of all events of its timeline before a place, as of the newest of
them, T. An event enters the first state after it, and states are carried from each to the next, decayed: so all that
impressions need costs one pass. Masses are float64 and have no gradient; sums have the values' type.

Shapes: M events of all timelines, one timeline after another; B impressions, C candidates, H heads, K codewords per
group, R rates, E key width per head, D value width per head; P kept states, V events that are in a state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch.nn import functional

from models.cache_kernels import VANISHED


@dataclass(frozen=True, kw_only=True, slots=True)
class Timelines:
    """Events, each timeline's oldest first. key_MHE has the codewords as values, and the gradient of the keys."""

    key_MHE: Float[torch.Tensor, "M H E"]
    code_MH: Int64[torch.Tensor, "M H"]
    value_MHD: Float[torch.Tensor, "M H D"]
    time_ms_M: Int64[torch.Tensor, "M"]
    weight_M: Float[torch.Tensor, "M"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Impressions:
    """Queries, already scaled by tau, and the events first_B:end_B that they see, the oldest of the timeline first."""

    query_BCHE: Float[torch.Tensor, "B C H E"]
    first_B: Int64[torch.Tensor, "B"]
    end_B: Int64[torch.Tensor, "B"]
    now_ms_B: Int64[torch.Tensor, "B"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Marks:
    """Where states are kept: before the events place_P. Marks of one timeline follow one another.

    mark_B: each impression's (P: it sees no event before its own chunk). event_V are the events between a mark and
    the one before it, mark_V the mark. by_rank[r]: the marks that have r others of their timeline before them.
    """

    place_P: Int64[torch.Tensor, "P"]
    mark_B: Int64[torch.Tensor, "B"]
    event_V: Int64[torch.Tensor, "V"]
    mark_V: Int64[torch.Tensor, "V"]
    by_rank: list[torch.Tensor]

    @classmethod
    def of(cls, asked: Impressions, chunk: int) -> Marks:
        begin_B = asked.end_B - (asked.end_B - asked.first_B) % chunk
        any_B = begin_B > asked.first_B
        place_P, mark = torch.unique(begin_B[any_B], return_inverse=True)
        first_P = torch.empty_like(place_P).scatter_(0, mark, asked.first_B[any_B])
        at_P = torch.arange(len(place_P), device=place_P.device)
        follows_P = (first_P == first_P.roll(1)) & (at_P > 0)
        size_P = place_P - torch.where(follows_P, place_P.roll(1), first_P)
        mark_V = at_P.repeat_interleave(size_P)
        rank_P = at_P - torch.where(follows_P, 0, at_P).cummax(0).values if len(at_P) else at_P
        return cls(
            place_P=place_P,
            mark_B=torch.full_like(asked.end_B, len(place_P)).masked_scatter(any_B, mark),
            event_V=torch.arange(len(mark_V), device=mark_V.device) + (place_P - size_P.cumsum(0))[mark_V],
            mark_V=mark_V,
            by_rank=[(rank_P == r).nonzero()[:, 0] for r in range(int(rank_P.max()) + 1)] if len(at_P) else [],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class States:
    """The masses of all kept states, and what a sum over events needs: nothing here has a gradient.

    row_VH: the entry (mark, head, codeword) of an event. part_VHR: w exp(-lambda (T - t)) for its mark's T.
    decay_PHR: from the mark before to this one.
    """

    marks: Marks
    time_ms_P: Int64[torch.Tensor, "P"]
    row_VH: Int64[torch.Tensor, "V H"]
    part_VHR: Float[torch.Tensor, "V H R"]
    decay_PHR: Float[torch.Tensor, "P H R"]
    mass_PHKR: Float[torch.Tensor, "P H K R"]

    @classmethod
    @torch.no_grad()
    def of(cls, events: Timelines, marks: Marks, rate_HR: torch.Tensor, codewords: int) -> States:
        heads, rates = rate_HR.shape
        time_ms_P = events.time_ms_M[marks.place_P - 1]
        at_H = torch.arange(heads, device=time_ms_P.device)
        row_VH = (marks.mark_V[:, None] * heads + at_H) * codewords + events.code_MH[marks.event_V]
        age_V = (time_ms_P[marks.mark_V] - events.time_ms_M[marks.event_V]).double()
        weight_V = events.weight_M[marks.event_V].clamp(min=0).double()
        part_VHR = weight_V[:, None, None] * torch.exp(-rate_HR.double() * age_V[:, None, None])
        span_P = (time_ms_P - time_ms_P.roll(1)).clamp(min=0).double()
        decay_PHR = torch.exp(-rate_HR.double() * span_P[:, None, None])
        mass_PHKR = part_VHR.new_zeros(len(time_ms_P) * heads * codewords, rates)
        mass_PHKR.index_add_(0, row_VH.flatten(), part_VHR.flatten(0, 1))
        mass_PHKR = mass_PHKR.view(len(time_ms_P), heads, codewords, rates)
        carry(mass_PHKR[..., None], marks, decay_PHR)
        return cls(
            marks=marks,
            time_ms_P=time_ms_P,
            row_VH=row_VH,
            part_VHR=part_VHR,
            decay_PHR=decay_PHR,
            mass_PHKR=torch.where(mass_PHKR < VANISHED, 0.0, mass_PHKR),
        )


def value_sums(value_MHD: torch.Tensor, states: States) -> Float[torch.Tensor, "P H K R D"]:
    """The sums of the values of all kept states: mass times mean of `cache`."""
    return _Sums.apply(value_MHD, states)


class _Sums(torch.autograd.Function):
    """Values scattered into their marks' entries and carried forward; their gradients carried back and gathered."""

    @staticmethod
    def forward(ctx: Any, value_MHD: torch.Tensor, states: States) -> torch.Tensor:
        ctx.states, ctx.shape = states, value_MHD.shape
        value_VHD = value_MHD[states.marks.event_V]
        marks, heads, codewords, rates = states.mass_PHKR.shape
        sum_NRD = value_MHD.new_zeros(marks * heads * codewords, rates, value_MHD.shape[2])
        term_VHRD = states.part_VHR.to(value_VHD.dtype)[..., None] * value_VHD[:, :, None, :]
        sum_NRD.index_add_(0, states.row_VH.flatten(), term_VHRD.flatten(0, 1))
        sum_PHKRD = sum_NRD.view(marks, heads, codewords, rates, value_MHD.shape[2])
        carry(sum_PHKRD, states.marks, states.decay_PHR)
        return sum_PHKRD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        states, sum_PHKRD = ctx.states, gradients[0].clone()
        carry_back(sum_PHKRD, states.marks, states.decay_PHR)
        of_VHRD = functional.embedding(states.row_VH, sum_PHKRD.flatten(0, 2).flatten(1))
        of_VHRD = of_VHRD.unflatten(-1, sum_PHKRD.shape[3:])
        value_MHD = sum_PHKRD.new_zeros(ctx.shape)
        # An event is in one segment: nothing is added twice.
        value_MHD[states.marks.event_V] = (states.part_VHR.to(of_VHRD.dtype)[..., None] * of_VHRD).sum(dim=2)
        return value_MHD, None


def carry(x_PHKRX: torch.Tensor, marks: Marks, decay_PHR: torch.Tensor) -> None:
    """Add to each state of a timeline the one before it, decayed."""
    decay_PH1R1 = decay_PHR.to(x_PHKRX.dtype)[:, :, None, :, None]
    for at_Q in marks.by_rank[1:]:
        x_PHKRX[at_Q] += decay_PH1R1[at_Q] * x_PHKRX[at_Q - 1]


def carry_back(x_PHKRX: torch.Tensor, marks: Marks, decay_PHR: torch.Tensor) -> None:
    """The transpose of `carry`."""
    decay_PH1R1 = decay_PHR.to(x_PHKRX.dtype)[:, :, None, :, None]
    for at_Q in reversed(marks.by_rank[1:]):
        x_PHKRX[at_Q - 1] += decay_PH1R1[at_Q] * x_PHKRX[at_Q]
