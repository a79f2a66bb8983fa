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

Knows nothing of items, users or training. Shapes: as in `states`, with S events of a chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Float64
from torch.nn import functional

from models.attention import Kernel, attention_weights, centred, log_weights, masses_now, nothing
from models.states import Impressions, Marks, States, Timelines, carry_back, value_sums

# Events whose keys' gradients are summed at once: E x D numbers for each of them and each head.
EVENTS_AT_ONCE = 8_192
_NOWHERE = -1e12


class Seen(NamedTuple):
    """What each impression's candidates see, and log sum_i w_i kappa_h(now - t_i) of all events before it."""

    out_BCHD: Float[torch.Tensor, "B C H D"]
    log_mass_BH: Float64[torch.Tensor, "B H"]


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
) -> Seen:
    """What each impression's candidates see of the events before it. `chunk` changes cost and memory, not a result."""
    with torch.autocast(asked.query_BCHE.device.type, enabled=False):
        return _read_timelines(asked, events, codeword_HKE, kernel, chunk)


def _read_timelines(
    asked: Impressions, events: Timelines, codeword_HKE: torch.Tensor, kernel: Kernel, chunk: int
) -> Seen:
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
    log_BHX = torch.cat([log_mass_BHK, log_own_BHS], dim=-1)
    bias_BHX = centred(log_BHX, dtype)
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
    out_BCHD = out_BCHD + _StateKeys.apply(events.key_MHE, events.value_MHD.detach(), seen)
    return Seen(out_BCHD, log_BHX.detach().logsumexp(dim=-1))


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
        of_entry = (states.mass_PHKR.shape[-1], ctx.shape[2], ctx.value_MHD.shape[2] + 1)
        for at in range(0, len(states.row_VH), EVENTS_AT_ONCE):
            some = slice(at, at + EVENTS_AT_ONCE)
            event_V = states.marks.event_V[some]
            value_VHD = functional.pad(ctx.value_MHD[event_V], (0, 1), value=1.0)
            adjoint_JREX = functional.embedding(states.row_VH[some], adjoint_NRX).view(-1, *of_entry)
            one_VHRX = states.part_VHR[some].to(value_VHD.dtype)[..., None] * value_VHD[:, :, None, :]
            key_JRE1 = adjoint_JREX @ one_VHRX.flatten(0, 1)[..., None]
            key_MHE[event_V] = key_JRE1.sum(dim=(1, 3)).view(-1, *ctx.shape[1:])
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
    carry_back(adjoint_PHKRX, states.marks, states.decay_PHR)
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
    age_ms_B = now_ms_B - functional.pad(states.time_ms_P, (0, 1))[states.marks.mark_B]
    some_BHK = functional.pad(some_PHKR.any(dim=-1), (0,) * 5 + (1,))[states.marks.mark_B]
    log_mass_BHK, log_share_BHKR = masses_now(log_BHKR, age_ms_B, kernel)
    return torch.where(some_BHK, log_mass_BHK, -torch.inf), log_share_BHKR.exp()


def _own_chunk(asked: Impressions, chunk: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The places of the events of each impression's own chunk before it, and which of them are any (both B x S)."""
    size_B = (asked.end_B - asked.first_B) % chunk
    at_S = torch.arange(int(size_B.max()) if len(size_B) else 0, device=size_B.device)
    real_BS = at_S < size_B[:, None]
    return torch.where(real_BS, (asked.end_B - size_B)[:, None] + at_S, 0), real_BS


def _inverse(mass_PHKR: torch.Tensor) -> torch.Tensor:
    return torch.where(mass_PHKR > 0, 1 / mass_PHKR, 0.0)


def _take(rows_MXY: torch.Tensor, at_BS: torch.Tensor) -> torch.Tensor:
    return functional.embedding(at_BS, rows_MXY.flatten(1)).unflatten(-1, rows_MXY.shape[1:])
