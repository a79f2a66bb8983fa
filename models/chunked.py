"""Attention over timelines at a cost per impression that does not grow with their length: the form of training.

All impressions of a user share one pass over the timeline. Up to the chunk that an impression is in, the events are a
state per codeword, as in `cache`; the at most S - 1 events of its own chunk are attended one by one, in the same
softmax. What is read, and every gradient, are those of `attention.read_history` with straight-through keys k_i = c_j:

    state:      m_jr(T) = sum over i before the chunk with code j of w_i exp(-lambda_r (T - t_i)), and s_jr of v_i alike
    dL / dk_i = sum_r w_i exp(-lambda_r (T - t_i)) (A_jr v_i - B_jr)
    A_jr      = sum_n p_njr / m_jr q_n g_n',   B_jr = sum_n p_njr / m_jr q_n (g_n . o_n)

with p_njr the part of query n's softmax that the state's entry (j, r) has, o_n what it read and g_n = dL / do_n
(differentiate the softmax, and gather events by code). As states are carried forward, A and B are carried backward,
decayed by the same factors: a key's gradient costs O(E D), however many queries read it (Transformer-VQ, 2309.16354,
has the recurrence of the states).

A state is kept only where an impression's chunk begins. Its time T is that of its newest event, as in `cache`; masses
are float64, sums have the values' type. Knows nothing of items, users or training.

Shapes: M events of all timelines, one timeline after another; B impressions, C candidates, H heads, K codewords per
group, R rates, E key width per head, D value width per head; P kept states, V events that are in a state, S events of
a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch.nn import functional

from models.attention import Kernel, attention_weights, centred, log_weights, nothing
from models.cache_kernels import VANISHED

# Events whose keys' gradients are summed at once: E x D numbers for each of them and each head.
EVENTS_AT_ONCE = 8_192
_NOWHERE = -1e12


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
        _carry(mass_PHKR[..., None], marks, decay_PHR)
        return cls(
            marks=marks,
            time_ms_P=time_ms_P,
            row_VH=row_VH,
            part_VHR=part_VHR,
            decay_PHR=decay_PHR,
            mass_PHKR=torch.where(mass_PHKR < VANISHED, 0.0, mass_PHKR),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Seen:
    """What queries read of the states, for the gradient of the keys: weights by codeword, shares of its rates."""

    states: States
    query_BCHE: torch.Tensor
    weight_BHCK: torch.Tensor
    share_BHKR: torch.Tensor
    out_BCHD: torch.Tensor


def read_timelines(
    asked: Impressions,
    events: Timelines,
    codeword_HKE: Float[torch.Tensor, "H K E"],
    kernel: Kernel,
    chunk: int,
) -> Float[torch.Tensor, "B C H D"]:
    """What each impression's candidates see of the events before it. `chunk` changes cost and memory, not a result."""
    dtype, codewords = asked.query_BCHE.dtype, codeword_HKE.shape[1]
    states = States.of(events, Marks.of(asked, chunk), kernel.rate_HR, codewords)
    place_BS, real_BS = _own_chunk(asked, chunk)
    weight_BS = torch.where(real_BS, events.weight_M[place_BS], 0.0)
    log_own_BHS = log_weights(kernel, events.time_ms_M[place_BS], weight_BS, asked.now_ms_B)
    log_mass_BHK, share_BHKR = _masses(states, kernel, asked.now_ms_B)
    share_BHKR = share_BHKR.to(dtype)
    query_BHCE = asked.query_BCHE.transpose(1, 2)
    key_BHSE = _take(events.key_MHE, place_BS).transpose(1, 2)
    logit_BHCX = torch.cat([query_BHCE @ codeword_HKE.transpose(-1, -2), query_BHCE @ key_BHSE.transpose(-1, -2)], -1)
    bias_BHX = centred(torch.cat([log_mass_BHK, log_own_BHS], dim=-1), dtype)
    weight_BHCX = attention_weights(logit_BHCX, bias_BHX)
    seen_BHKD = (share_BHKR[..., None] * _means(states, events.value_MHD)).sum(dim=-2)
    value_BHXD = torch.cat([seen_BHKD, _take(events.value_MHD, place_BS).transpose(1, 2)], dim=-2)
    out_BHCD = torch.where(nothing(bias_BHX)[:, :, None, None], 0.0, weight_BHCX @ value_BHXD)
    out_BCHD = out_BHCD.transpose(1, 2)
    seen = _Seen(
        states=states,
        query_BCHE=asked.query_BCHE.detach(),
        weight_BHCK=weight_BHCX[..., :codewords].detach(),
        share_BHKR=share_BHKR.detach(),
        out_BCHD=out_BCHD.detach(),
    )
    return out_BCHD + _StateKeys.apply(events.key_MHE, events.value_MHD.detach(), seen)


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
        _carry(sum_PHKRD, states.marks, states.decay_PHR)
        return sum_PHKRD

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        states, sum_PHKRD = ctx.states, gradients[0].clone()
        _carry_back(sum_PHKRD, states.marks, states.decay_PHR)
        of_VHRD = functional.embedding(states.row_VH, sum_PHKRD.flatten(0, 2).flatten(1))
        of_VHRD = of_VHRD.unflatten(-1, sum_PHKRD.shape[3:])
        value_MHD = sum_PHKRD.new_zeros(ctx.shape)
        # An event is in one segment: nothing is added twice.
        value_MHD[states.marks.event_V] = (states.part_VHR.to(of_VHRD.dtype)[..., None] * of_VHRD).sum(dim=2)
        return value_MHD, None


class _StateKeys(torch.autograd.Function):
    """Zeros to be added to what was read: they have the gradient of the keys of the events within states."""

    @staticmethod
    def forward(ctx: Any, key_MHE: torch.Tensor, value_MHD: torch.Tensor, seen: _Seen) -> torch.Tensor:
        ctx.seen, ctx.value_MHD, ctx.shape = seen, value_MHD, key_MHE.shape
        return torch.zeros_like(seen.out_BCHD)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        seen, states = ctx.seen, ctx.seen.states
        adjoint_NRX = _adjoints(seen, gradients[0]).flatten(0, 2).flatten(1)
        key_MHE = ctx.value_MHD.new_zeros(ctx.shape)
        width = (ctx.shape[2], ctx.value_MHD.shape[2] + 1)
        for at in range(0, len(states.row_VH), EVENTS_AT_ONCE):
            some = slice(at, at + EVENTS_AT_ONCE)
            event_V = states.marks.event_V[some]
            value_VHD = functional.pad(ctx.value_MHD[event_V], (0, 1), value=1.0)
            of_VHREX = functional.embedding(states.row_VH[some], adjoint_NRX).unflatten(-1, (-1, *width))
            part_VHR = states.part_VHR[some].to(value_VHD.dtype)
            one_VHR1X = part_VHR[..., None, None] * value_VHD[:, :, None, None, :]
            key_MHE[event_V] = (of_VHREX * one_VHR1X).sum(dim=(2, 4))
        return key_MHE, None, None


def _adjoints(seen: _Seen, gradient_BCHD: torch.Tensor) -> Float[torch.Tensor, "P H K R X"]:
    """A and -B side by side, E x (D + 1) in one, of all states, with what later states hand back."""
    states = seen.states
    drift_BCH1 = -(gradient_BCHD * seen.out_BCHD).sum(dim=-1, keepdim=True)
    end_BCHX = torch.cat([gradient_BCHD, drift_BCH1], dim=-1)
    outer_BCHX = (seen.query_BCHE[..., None] * end_BCHX[..., None, :]).flatten(-2)
    by_code_BHKX = seen.weight_BHCK.transpose(-1, -2) @ outer_BCHX.transpose(1, 2)
    terms_BHKRX = seen.share_BHKR[..., None] * by_code_BHKX[..., None, :]
    # The last row is that of impressions without a state: their weights of codewords are zero.
    adjoint_PHKRX = terms_BHKRX.new_zeros(len(states.mass_PHKR) + 1, *terms_BHKRX.shape[1:])
    adjoint_PHKRX.index_add_(0, states.marks.mark_B, terms_BHKRX)
    adjoint_PHKRX = adjoint_PHKRX[:-1] * _inverse(states.mass_PHKR).to(terms_BHKRX.dtype)[..., None]
    _carry_back(adjoint_PHKRX, states.marks, states.decay_PHR)
    return adjoint_PHKRX


def _means(states: States, value_MHD: torch.Tensor) -> Float[torch.Tensor, "B H K R D"]:
    """The mean values of each impression's state, zeros where it has none."""
    sum_PHKRD = value_sums(value_MHD, states)
    mean_PHKRD = sum_PHKRD * _inverse(states.mass_PHKR).to(sum_PHKRD.dtype)[..., None]
    return functional.pad(mean_PHKRD, (0,) * 9 + (1,)).index_select(0, states.marks.mark_B)


def _masses(states: States, kernel: Kernel, now_ms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log M(now) in float64 (B H K), -inf where there is no mass; and the share that each rate has in it (B H K R)."""
    some_PHKR = states.mass_PHKR > 0
    # A finite stand-in for -inf: the gradient of a logsumexp of nothing is not a number.
    log_PHKR = torch.where(some_PHKR, states.mass_PHKR.log(), _NOWHERE)
    log_BHKR = functional.pad(log_PHKR, (0,) * 7 + (1,), value=_NOWHERE)[states.marks.mark_B]
    age_B = (now_ms_B - functional.pad(states.time_ms_P, (0, 1))[states.marks.mark_B]).double()
    log_share_BHR = kernel.log_weight_HR.double() - kernel.rate_HR.double() * age_B[:, None, None]
    some_BHK = functional.pad(some_PHKR.any(dim=-1), (0,) * 5 + (1,))[states.marks.mark_B]
    log_mass_BHKR = log_BHKR + log_share_BHR[:, :, None, :]
    log_mass_BHK = torch.logsumexp(log_mass_BHKR, dim=-1)
    share_BHKR = (log_mass_BHKR - log_mass_BHK[..., None]).exp()
    return torch.where(some_BHK, log_mass_BHK, -torch.inf), share_BHKR


def _own_chunk(asked: Impressions, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the events of each impression's own chunk before it, and which of them are any (both B x S)."""
    size_B = (asked.end_B - asked.first_B) % chunk
    at_S = torch.arange(int(size_B.max()) if len(size_B) else 0, device=size_B.device)
    real_BS = at_S < size_B[:, None]
    return torch.where(real_BS, (asked.end_B - size_B)[:, None] + at_S, 0), real_BS


def _carry(x_PHKRX: torch.Tensor, marks: Marks, decay_PHR: torch.Tensor) -> None:
    """Add to each state of a timeline the one before it, decayed."""
    decay_PH1R1 = decay_PHR.to(x_PHKRX.dtype)[:, :, None, :, None]
    for at_Q in marks.by_rank[1:]:
        x_PHKRX[at_Q] += decay_PH1R1[at_Q] * x_PHKRX[at_Q - 1]


def _carry_back(x_PHKRX: torch.Tensor, marks: Marks, decay_PHR: torch.Tensor) -> None:
    """The transpose of `_carry`."""
    decay_PH1R1 = decay_PHR.to(x_PHKRX.dtype)[:, :, None, :, None]
    for at_Q in reversed(marks.by_rank[1:]):
        x_PHKRX[at_Q - 1] += decay_PH1R1[at_Q] * x_PHKRX[at_Q]


def _inverse(mass_PHKR: torch.Tensor) -> torch.Tensor:
    return torch.where(mass_PHKR > 0, 1 / mass_PHKR, 0.0)


def _take(rows_MXY: torch.Tensor, at_BS: torch.Tensor) -> torch.Tensor:
    return functional.embedding(at_BS, rows_MXY.flatten(1)).unflatten(-1, rows_MXY.shape[1:])
