"""Reading a cache, and its plain twin over the raw history: `read` == `read_history` on quantised keys.

    o_h(q, now) = sum_j exp(tau_h q.c_j) M_hj(now) u_hj(now) / sum_j exp(tau_h q.c_j) M_hj(now)
    M_hj(now)   = sum_r a_hr exp(-lambda_hr (now - T)) m_hjr          (VQL, arXiv 2508.17125)

Everything is done on logarithms and relative to each head's largest weight, so that neither a year of silence nor
a half-life of an hour under- or overflows. A codeword whose mass is not positive (a retraction that came before
its event) is read as absent. A user without history reads zeros.

Shapes: B users, C candidates, H heads, G groups, K codewords per group, R rates, E key width per head,
D value width per head, L events of a history; of counts (`models.counts`): N entries of the user who has most, Q
counted fields, R rates of their own, X = Q * R.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int32, Int64
from torch.nn import functional

from models.cache import Cache, CacheSpec
from models.count_kernels import BEYOND
from models.request import History

# Logits within this need no maximum subtracted: exp(2 * 30) times a mass that float32 loses beside the largest is 1e-12
# of the sum. Masses then meet the candidates in a product of matrices, which takes half the time of a softmax.
REACH_MAX = 30.0
TOTAL_MIN = 1e-30
LOG_MIN = -1e30


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheBatch:
    """The caches of a batch of users, dense; absent users have no mass and `present_B` False.

    The counts beside them are sparse, in rising order of cell; N is 0 where nothing is counted. The newest events are
    as in `models.request.History`, by row of the item table; L is 0 where none are attended one by one.
    """

    mass_BHKR: Float32[torch.Tensor, "B H K R"]
    mean_BHKRD: Float[torch.Tensor, "B H K R D"]
    reference_ms_B: Int64[torch.Tensor, "B"]
    count_B: Int64[torch.Tensor, "B"]
    present_B: Bool[torch.Tensor, "B"]
    cell_BN: Int32[torch.Tensor, "B N"]
    cell_mass_BNR: Float32[torch.Tensor, "B N R2"]
    newest_item_BL: Int64[torch.Tensor, "B L"]
    newest_action_BL: Int64[torch.Tensor, "B L"]
    newest_time_ms_BL: Int64[torch.Tensor, "B L"]
    newest_weight_BL: Float32[torch.Tensor, "B L"]

    @classmethod
    def of(
        cls,
        spec: CacheSpec,
        caches: Sequence[Cache | None],
        counts: Sequence[Cache | None] | None = None,
        newest: History | None = None,
    ) -> CacheBatch:
        """Scatter sparse caches (None: absent user) into one dense batch on the CPU, with counts and newest events."""
        group_heads = spec.heads // spec.groups
        mass = np.zeros((len(caches), spec.groups * spec.codewords, group_heads, spec.rates), np.float32)
        mean = np.zeros((*mass.shape, spec.value_width), np.float32)
        for b, cache in enumerate(caches):
            if cache is not None:
                mass[b, cache.code_N] = cache.mass_NPR
                mean[b, cache.code_N] = cache.mean_NPRD
        return cls(
            mass_BHKR=_by_head(torch.from_numpy(mass), spec),
            mean_BHKRD=_by_head(torch.from_numpy(mean), spec),
            reference_ms_B=torch.tensor([c.reference_ms if c else 0 for c in caches], dtype=torch.int64),
            count_B=torch.tensor([c.count if c else 0 for c in caches], dtype=torch.int64),
            present_B=torch.tensor([c is not None for c in caches], dtype=torch.bool),
            **padded_counts([None if c is None else (c.code_N, c.mass_NPR[:, 0]) for c in counts or ()], len(caches)),
            **newest_fields(newest or History.empty(len(caches))),
        )

    @property
    def newest(self) -> History:
        """The newest events of each user."""
        return History(**{field.name: getattr(self, f"newest_{field.name}") for field in fields(History)})

    def take(self, at_N: Sequence[int]) -> CacheBatch:
        """The caches of the users at these places."""
        if list(at_N) == list(range(len(self.count_B))):
            return self
        at = torch.tensor(at_N, dtype=torch.int64, device=self.count_B.device)
        return self._each(lambda tensor: tensor[at])

    def to(self, device: torch.device, means: torch.dtype = torch.float32) -> CacheBatch:
        """On this device, with means of this type. Masses stay float32: they span thirty orders of magnitude."""
        if (self.mean_BHKRD.device, self.mean_BHKRD.dtype) == (device, means):
            return self
        return replace(self, mean_BHKRD=self.mean_BHKRD.to(means))._each(lambda tensor: tensor.to(device))

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> CacheBatch:
        return CacheBatch(**{field.name: change(getattr(self, field.name)) for field in fields(self)})


def padded_counts(entries: Sequence[tuple[np.ndarray, np.ndarray] | None], users: int) -> dict[str, torch.Tensor]:
    """Each user's cells (N) and masses (N x R), None for no entry, as the fields of a CacheBatch that hold counts."""
    held = [each for each in entries if each is not None]
    longest = max((len(cell_N) for cell_N, _ in held), default=0)
    cell_BN = np.full((users, longest), BEYOND, np.int32)
    mass_BNR = np.zeros((users, longest, held[0][1].shape[1] if held else 0), np.float32)
    for b, each in enumerate(entries):
        if each is not None:
            cell_BN[b, : len(each[0])], mass_BNR[b, : len(each[0])] = each
    return {"cell_BN": torch.from_numpy(cell_BN), "cell_mass_BNR": torch.from_numpy(mass_BNR)}


def newest_fields(newest: History) -> dict[str, torch.Tensor]:
    """These events as the fields of a CacheBatch that hold them."""
    return {f"newest_{field.name}": getattr(newest, field.name) for field in fields(newest)}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kernel:
    """The separable temporal kernel kappa_h(dt) = sum_r a_hr exp(-lambda_hr dt), a_hr > 0, dt in ms."""

    log_weight_HR: Float[torch.Tensor, "H R"]
    rate_HR: Float[torch.Tensor, "H R"]


def read(
    query_BCHE: Float[torch.Tensor, "B C H E"],
    codeword_HKE: Float[torch.Tensor, "H K E"],
    cache: CacheBatch,
    kernel: Kernel,
    now_ms_B: Int64[torch.Tensor, "B"],
) -> Float[torch.Tensor, "B C H D"]:
    """Attention over each user's whole history from the cache alone. The query is already scaled by tau."""
    # Cauchy-Schwarz: how far from 0 a logit can be.
    reach = query_BCHE.norm(dim=-1).max() * codeword_HKE.norm(dim=-1).max()
    return read_entries(query_BCHE, codeword_HKE, entries_at(cache, kernel, now_ms_B), float(reach))


class Entries(NamedTuple):
    """What a read takes from caches: log M_hj(now), but for a constant of each head, and u_hj(now)."""

    log_mass_BHK: Float64[torch.Tensor, "B H K"]
    mean_BHKD: Float[torch.Tensor, "B H K D"]

    def weighed(self) -> Weighed:
        return Weighed(centred(self.log_mass_BHK).exp(), self.mean_BHKD)


class Weighed(NamedTuple):
    """The same with M_hj(now) itself, but for a factor of each head: where it is not positive, nothing is there."""

    mass_BHK: Float32[torch.Tensor, "B H K"]
    mean_BHKD: Float[torch.Tensor, "B H K D"]


def entries_at(cache: CacheBatch, kernel: Kernel, now_ms_B: Int64[torch.Tensor, "B"]) -> Entries:
    """The caches as of these times."""
    log_mass_BHKR = cache.mass_BHKR.clamp(min=0).double().log()
    if log_mass_BHKR.shape[-1] == 1:
        # What a single rate does to all codewords of a head alike is a constant, which no softmax sees.
        return Entries(log_mass_BHKR[..., 0], cache.mean_BHKRD[..., 0, :].float())
    log_mass_BHK, log_share_BHKR = masses_now(log_mass_BHKR, now_ms_B - cache.reference_ms_B, kernel)
    share_BHKR = torch.where(log_mass_BHK[..., None].isfinite(), log_share_BHKR.exp(), 0.0).float()
    return Entries(log_mass_BHK, (share_BHKR[..., None] * cache.mean_BHKRD).sum(dim=-2))


def log_mass_at(cache: CacheBatch, kernel: Kernel, now_ms_B: Int64[torch.Tensor, "B"]) -> Float64[torch.Tensor, "B H"]:
    """log sum_j M_hj(now): how much each head has to attend to. -inf where there is nothing."""
    log_mass_BH1R = cache.mass_BHKR.clamp(min=0).sum(dim=2, keepdim=True, dtype=torch.float64).log()
    return masses_now(log_mass_BH1R, now_ms_B - cache.reference_ms_B, kernel)[0][..., 0]


def weighed_at(cache: CacheBatch, kernel: Kernel, now_ms_B: Int64[torch.Tensor, "B"]) -> Weighed:
    """The caches as of these times, without logarithms where a single rate needs none."""
    if cache.mass_BHKR.shape[-1] == 1:
        return Weighed(cache.mass_BHKR.select(3, 0), cache.mean_BHKRD.select(3, 0).float())
    return entries_at(cache, kernel, now_ms_B).weighed()


def read_entries(
    query_BCHE: Float[torch.Tensor, "B C H E"],
    key_HKE: Float[torch.Tensor, "H K E"],
    entries: Entries,
    reach: float,
) -> Float[torch.Tensor, "B C H D"]:
    """`read` where entries are known, and how far from 0 a logit can be; keys are the codewords."""
    bias_BHK = centred(entries.log_mass_BHK)
    logit_BHCK = query_BCHE.transpose(1, 2) @ key_HKE.transpose(-1, -2)
    if not reach <= REACH_MAX:
        return _attend(logit_BHCK, bias_BHK, entries.mean_BHKD)
    mass_BHK1 = bias_BHK.exp()[..., None]
    sum_BHCX = logit_BHCK.exp_() @ torch.cat([mass_BHK1 * entries.mean_BHKD, mass_BHK1], dim=-1)
    # The largest mass is 1 and no logit is below -REACH_MAX: a total that is less is that of nobody's entries.
    total_BHC1 = sum_BHCX[..., -1:].clamp(min=TOTAL_MIN)
    return (sum_BHCX[..., :-1] / total_BHC1).transpose(1, 2)


def read_counts(
    cell_BCQ: Int32[torch.Tensor, "B C Q"],
    cache: CacheBatch,
    rate_R: Float64[torch.Tensor, "R"],
    now_ms_B: Int64[torch.Tensor, "B"],
) -> Float32[torch.Tensor, "B C X"]:
    """`models.counts.read` of a batch: each candidate's counts as of now, never negative; by bisection."""
    shape = (*cell_BCQ.shape[:2], cell_BCQ.shape[2] * len(rate_R))
    if cache.cell_BN.shape[1] == 0:
        return torch.zeros(shape, device=cell_BCQ.device)
    cell_BP = cell_BCQ.flatten(1)
    at_BP = torch.searchsorted(cache.cell_BN, cell_BP).clamp_(max=cache.cell_BN.shape[1] - 1)
    found_BP = cache.cell_BN.gather(1, at_BP) == cell_BP
    mass_BPR = cache.cell_mass_BNR.gather(1, at_BP[..., None].expand(-1, -1, len(rate_R)))
    decay_BR = (-rate_R * (now_ms_B - cache.reference_ms_B).double()[:, None]).exp()
    count_BPR = (mass_BPR * decay_BR[:, None]).clamp_(min=0)
    return torch.where(found_BP[..., None], count_BPR, 0.0).float().reshape(shape)


def masses_now(
    log_mass_BHKR: Float64[torch.Tensor, "B H K R"], age_ms_B: Int64[torch.Tensor, "B"], kernel: Kernel
) -> tuple[Float64[torch.Tensor, "B H K"], Float64[torch.Tensor, "B H K R"]]:
    """log M, from the logs of masses of this age, and the log of each rate's share in it (of no mass: not a number)."""
    age_B = age_ms_B.double()
    log_kappa_BHR = kernel.log_weight_HR.double() - kernel.rate_HR.double() * age_B[:, None, None]
    log_now_BHKR = log_mass_BHKR + log_kappa_BHR[:, :, None, :]
    log_now_BHK = torch.logsumexp(log_now_BHKR, dim=-1)
    return log_now_BHK, log_now_BHKR - log_now_BHK[..., None]


def normed_heads(x_NX: Float[torch.Tensor, "*N X"], heads: int) -> Float[torch.Tensor, "*N H E"]:
    """Keys or queries of all heads side by side (X = H * E), layer-normed head by head."""
    x_NHE = _in_whole(x_NX).unflatten(-1, (heads, -1))
    return functional.layer_norm(x_NHE, x_NHE.shape[-1:])


def _in_whole(x: torch.Tensor) -> torch.Tensor:
    """What autocast made in bfloat16 as float32: logits and weights of events need more than three digits."""
    return x.float() if x.dtype == torch.bfloat16 else x


def scaled_queries(
    x_NX: Float[torch.Tensor, "*N X"], log_temperature_H: Float[torch.Tensor, "H"]
) -> Float[torch.Tensor, "*N H E"]:
    """Layer-normed queries, scaled by the temperature (Transformer-VQ) and 1 / sqrt(E)."""
    query_NHE = normed_heads(x_NX, len(log_temperature_H))
    return query_NHE * (log_temperature_H.exp() / math.sqrt(query_NHE.shape[-1]))[:, None]


def read_history(
    query_BCHE: Float[torch.Tensor, "B C H E"],
    key_BLHE: Float[torch.Tensor, "B L H E"],
    value_BLHD: Float[torch.Tensor, "B L H D"],
    log_bias_BHL: Float[torch.Tensor, "B H L"],
) -> Float[torch.Tensor, "B C H D"]:
    """The plain twin: softmax attention over the raw events. With exact keys, what VQL approximates."""
    with torch.autocast(query_BCHE.device.type, enabled=False):
        logit_BHCL = torch.einsum("bche,blhe->bhcl", query_BCHE, key_BLHE)
        return _attend(logit_BHCL, log_bias_BHL, value_BLHD.transpose(1, 2))


def history_bias(
    kernel: Kernel,
    time_ms_BL: Int64[torch.Tensor, "B L"],
    weight_BL: Float[torch.Tensor, "B L"],
    now_ms_B: Int64[torch.Tensor, "B"],
) -> Float[torch.Tensor, "B H L"]:
    """log(w_i kappa_h(now - t_i)) less each head's maximum; -inf for padding (weight 0)."""
    return centred(log_weights(kernel, time_ms_BL, weight_BL, now_ms_B))


def log_weights(
    kernel: Kernel,
    time_ms_BL: Int64[torch.Tensor, "B L"],
    weight_BL: Float[torch.Tensor, "B L"],
    now_ms_B: Int64[torch.Tensor, "B"],
) -> Float64[torch.Tensor, "B H L"]:
    """log(w_i kappa_h(now - t_i)), -inf for padding (weight 0)."""
    age_BL = (now_ms_B[:, None] - time_ms_BL).double()
    log_kappa_BHLR = (
        kernel.log_weight_HR.double()[None, :, None, :]
        - kernel.rate_HR.double()[None, :, None, :] * age_BL[:, None, :, None]
    )
    # A single rate needs no logsumexp, and most models have a single rate.
    one_rate = log_kappa_BHLR.shape[-1] == 1
    log_kappa_BHL = log_kappa_BHLR[..., 0] if one_rate else torch.logsumexp(log_kappa_BHLR, dim=-1)
    return log_kappa_BHL + weight_BL.clamp(min=0).double().log()[:, None, :]


def attention_weights(
    logit_BHCX: Float[torch.Tensor, "B H C X"], bias_BHX: Float[torch.Tensor, "B H X"]
) -> Float[torch.Tensor, "B H C X"]:
    """Softmax over X of logit + bias. Where every bias is -inf the weights say nothing: `nothing` tells where."""
    safe_BHX = torch.where(nothing(bias_BHX)[..., None], 0.0, bias_BHX)
    return torch.softmax(logit_BHCX + safe_BHX[:, :, None, :], dim=-1)


def nothing(bias_BHX: Float[torch.Tensor, "B H X"]) -> Bool[torch.Tensor, "B H"]:
    """Which users' heads have nothing to attend to."""
    return ~bias_BHX.isfinite().any(dim=-1)


def centred(
    log_BHX: Float64[torch.Tensor, "B H X"], dtype: torch.dtype = torch.float32
) -> Float[torch.Tensor, "B H X"]:
    """Subtract each head's maximum in float64, then drop to `dtype`: softmax does not see the shift."""
    # Where nothing has mass, -inf stays -inf.
    return (log_BHX - log_BHX.detach().amax(dim=-1, keepdim=True).clamp(min=LOG_MIN)).to(dtype)


def _attend(logit_BHCX: torch.Tensor, bias_BHX: torch.Tensor, value_BHXD: torch.Tensor) -> torch.Tensor:
    """The values, weighted; zeros where every bias is -inf. Returns B C H D."""
    out_BHCD = torch.einsum("bhcx,bhxd->bhcd", attention_weights(logit_BHCX, bias_BHX), value_BHXD)
    return torch.where(nothing(bias_BHX)[:, :, None, None], 0.0, out_BHCD).transpose(1, 2)


def _by_head(x: torch.Tensor, spec: CacheSpec) -> torch.Tensor:
    """(B, G * K, P, ...) to (B, H, K, ...)."""
    x = x.unflatten(1, (spec.groups, spec.codewords)).transpose(2, 3)
    return x.flatten(1, 2).contiguous()
