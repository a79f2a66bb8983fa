"""The per-codeword cache of one user and its algebra: `empty`, `delta`, `fold`, `merge`, `decay`.

A cache is a finite map codeword -> (mass, mean value), one pair for each head of the codeword's group and each
decay rate. With event weight w_i, time t_i, value v_i and rate lambda, as of the reference time T:

    mass_j = sum over i with code(i) = j of w_i exp(-lambda (T - t_i))          (VQL, arXiv 2508.17125;
    mean_j = (1 / mass_j) sum of the same terms times v_i                        Transformer-VQ, 2309.16354)

The laws, each a test: merge is associative and commutative with `empty` as identity; decay composes and
distributes over merge; fold(cache, events) = merge(cache, delta(events)). The law that does *not* hold is
idempotence: an event folded twice counts twice. Hence events at or below a row's stamp are skipped before they
are folded, and whole states are published, never increments.

T is the newest event time folded, so every decay factor is at most 1 and nothing overflows, however long the
wait. Sums run in float64 and are kept in float32.

An event of negative weight retracts an earlier one: same item, action, time and size. Each entry therefore counts
its events net of retractions, an exact integer: a mass that cancels to rounding error is exactly zero, and "rounding
error" is wider where the net count is zero (many folds may have added to it: a ghost of 1e-8 could outshine a head's
year-old memories). An entry with no mass left is gone. The laws hold for logs in which a retraction follows its
event; one that comes first and cancels another event's mass exactly makes the entry forget the other's value.

No other file multiplies a mass but `cache_kernels` and `count_kernels`, the compiled forms of what is here, and
`states`, the differentiable one. Knows nothing of items, rows or torch.

Shapes: N events or entries, G groups, K codewords per group, H heads, P = H / G heads per group, R decay rates,
D value width per head. An entry's code is g * K + j.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float32, Float64, Int32, Int64, UInt16

from models.cache_kernels import CANCELLED, CANCELLED_WHOLLY, VANISHED, fold_kernel
from models.errors import MismatchError


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheSpec:
    """What two caches must share to be combined: the checkpoint and its sizes.

    rate_HR is lambda in 1/ms, zero for "never forgets".
    """

    checkpoint_id: str
    groups: int
    codewords: int
    value_width: int
    rate_HR: Float64[np.ndarray, "H R"]

    @property
    def heads(self) -> int:
        return self.rate_HR.shape[0]

    @property
    def rates(self) -> int:
        return self.rate_HR.shape[1]

    @property
    def rate_GPR(self) -> Float64[np.ndarray, "G P R"]:
        return self.rate_HR.reshape(self.groups, self.heads // self.groups, self.rates)


@dataclass(frozen=True, kw_only=True, slots=True)
class Cache:
    """One user's non-empty codewords in rising order of code, as of reference_ms; `count` events went in.

    net_N is each entry's number of events less its retractions.
    """

    spec: CacheSpec
    reference_ms: int
    count: int
    code_N: UInt16[np.ndarray, "N"]
    net_N: Int32[np.ndarray, "N"]
    mass_NPR: Float32[np.ndarray, "N P R"]
    mean_NPRD: Float32[np.ndarray, "N P R D"]


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedEvents:
    """Events after the item table: a code per group, a value per head, the time and the weight."""

    code_NG: UInt16[np.ndarray, "N G"]
    value_NHD: Float32[np.ndarray, "N H D"]
    time_ms_N: Int64[np.ndarray, "N"]
    weight_N: Float32[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.time_ms_N)


def decay_rates(half_life_ms: Sequence[Sequence[float | None]]) -> Float64[np.ndarray, "H R"]:
    """lambda = ln 2 / half-life, in 1/ms; 0 for None, which never forgets."""
    return np.log(2.0) / np.array([[np.inf if h is None else h for h in row] for row in half_life_ms], np.float64)


def empty(spec: CacheSpec) -> Cache:
    """The identity of merge: no codeword, no event. Its reference time, 0, precedes every event's."""
    return _build(spec, (0, 0), np.empty(0, np.int64), np.empty(0, np.int64), _moments(spec, 0))


def delta(spec: CacheSpec, events: EncodedEvents) -> Cache:
    """The cache of these events alone, in plain numpy (the obvious twin of the kernel in `fold`)."""
    if len(events) == 0:
        return empty(spec)
    reference_ms = int(events.time_ms_N.max())
    group_heads = spec.heads // spec.groups
    value_NGPD = events.value_NHD.reshape(len(events), spec.groups, group_heads, spec.value_width).astype(np.float64)
    age_N = (reference_ms - events.time_ms_N).astype(np.float64)
    net: dict[int, int] = {}
    moment: dict[int, np.ndarray] = {}
    gross: dict[int, np.ndarray] = {}
    for i in range(len(events)):
        for g in range(spec.groups):
            code = g * spec.codewords + int(events.code_NG[i, g])
            mass_PR = float(events.weight_N[i]) * np.exp(-spec.rate_GPR[g] * age_N[i])
            term = np.concatenate([mass_PR[..., None], mass_PR[..., None] * value_NGPD[i, g][:, None, :]], axis=-1)
            net[code] = net.get(code, 0) + (1 if events.weight_N[i] > 0 else -1)
            moment[code] = moment.get(code, 0.0) + term
            gross[code] = gross.get(code, 0.0) + np.abs(mass_PR)
    codes = np.array(sorted(moment), np.int64)
    moment_NPRS = np.stack([moment[c] for c in codes])
    net_N = np.array([net[c] for c in codes])
    _zero_cancelled(moment_NPRS, np.stack([gross[c] for c in codes]), net_N)
    return _build(spec, (reference_ms, len(events)), codes, net_N, moment_NPRS)


def merge(a: Cache, b: Cache) -> Cache:
    """The cache of the events of both. Raises MismatchError when their checkpoints differ."""
    spec = a.spec
    if spec.checkpoint_id != b.spec.checkpoint_id:
        raise MismatchError(
            f"caches of two checkpoints cannot be merged: {spec.checkpoint_id} and {b.spec.checkpoint_id}"
        )
    reference_ms = max(a.reference_ms, b.reference_ms)
    codes = np.union1d(a.code_N, b.code_N).astype(np.int64)
    moment_NPRS = _moments(spec, len(codes))
    net_N = np.zeros(len(codes), np.int64)
    gross_NPR = np.zeros(moment_NPRS.shape[:-1])
    for part in (a, b):
        mass_NPR = _decayed(part, reference_ms)
        at = np.searchsorted(codes, part.code_N)
        net_N[at] += part.net_N
        moment_NPRS[at, ..., 0] += mass_NPR
        moment_NPRS[at, ..., 1:] += mass_NPR[..., None] * part.mean_NPRD
        gross_NPR[at] += np.abs(mass_NPR)
    _zero_cancelled(moment_NPRS, gross_NPR, net_N)
    return _build(spec, (reference_ms, a.count + b.count), codes, net_N, moment_NPRS)


def decay(cache: Cache, to_ms: int) -> Cache:
    """The same events seen from a later reference time: masses shrink, means stay.

    Raises ValueError for a time before the cache's own: masses would grow without bound.
    """
    if to_ms < cache.reference_ms:
        raise ValueError(f"cannot decay back from {cache.reference_ms} to {to_ms}")
    mass_NPR = _decayed(cache, to_ms)
    moment_NPRS = np.concatenate([mass_NPR[..., None], mass_NPR[..., None] * cache.mean_NPRD], axis=-1)
    return _build(cache.spec, (to_ms, cache.count), cache.code_N.astype(np.int64), cache.net_N, moment_NPRS)


def fold(cache: Cache, events: EncodedEvents) -> Cache:
    """merge(cache, delta(events)), by a compiled kernel: O(entries + events) for one user."""
    if len(events) == 0:
        return cache
    spec = cache.spec
    reference_ms = max(cache.reference_ms, int(events.time_ms_N.max()))
    code_N, net_N, moment_NPRS = fold_kernel(
        cache.code_N,
        cache.net_N,
        cache.mass_NPR,
        cache.mean_NPRD,
        reference_ms - cache.reference_ms,
        events.code_NG,
        events.value_NHD,
        reference_ms - events.time_ms_N,
        events.weight_N,
        spec.rate_GPR,
        spec.codewords,
    )
    return _build(spec, (reference_ms, cache.count + len(events)), code_N, net_N, moment_NPRS)


def log_mass(cache: Cache, now_ms: int) -> Float64[np.ndarray, "N P R"]:
    """log m_j exp(-lambda (now - T)), float64; -inf where no positive mass is left. For tests and small tools."""
    group_N = cache.code_N.astype(np.int64) // cache.spec.codewords
    with np.errstate(divide="ignore", invalid="ignore"):
        log_NPR = np.log(cache.mass_NPR.astype(np.float64))
    log_NPR[~(cache.mass_NPR > 0)] = -np.inf
    return log_NPR - cache.spec.rate_GPR[group_N] * float(now_ms - cache.reference_ms)


def _moments(spec: CacheSpec, n: int) -> Float64[np.ndarray, "N P R S"]:
    return np.zeros((n, spec.heads // spec.groups, spec.rates, 1 + spec.value_width))


def _decayed(cache: Cache, to_ms: int) -> Float64[np.ndarray, "N P R"]:
    group_N = cache.code_N.astype(np.int64) // cache.spec.codewords
    return cache.mass_NPR * np.exp(-cache.spec.rate_GPR[group_N] * float(to_ms - cache.reference_ms))


def _zero_cancelled(moment_NPRS: np.ndarray, gross_NPR: np.ndarray, net_N: np.ndarray) -> None:
    mass_NPR = np.abs(moment_NPRS[..., 0])
    error_NPR = gross_NPR * np.where(net_N == 0, CANCELLED_WHOLLY, CANCELLED)[:, None, None]
    moment_NPRS[(mass_NPR <= error_NPR) | (mass_NPR < VANISHED)] = 0.0


def _build(
    spec: CacheSpec,
    reference_ms_and_count: tuple[int, int],
    code_N: np.ndarray,
    net_N: np.ndarray,
    moment_NPRS: Float[np.ndarray, "N P R S"],
) -> Cache:
    """Moments (mass, mass * mean) to a cache; entries without mass are dropped."""
    mass_NPR = moment_NPRS[..., 0].astype(np.float32)
    alive_NPR = np.abs(mass_NPR) >= np.float32(VANISHED)
    kept_N = alive_NPR.any(axis=(1, 2))
    mass_NPR = np.where(alive_NPR, mass_NPR, np.float32(0.0))[kept_N]
    divisor_NPR = np.where(alive_NPR, moment_NPRS[..., 0], 1.0)[kept_N]
    mean_NPRD = moment_NPRS[kept_N, ..., 1:] / divisor_NPR[..., None]
    mean_NPRD[~alive_NPR[kept_N]] = 0.0
    reference_ms, count = reference_ms_and_count
    return Cache(
        spec=spec,
        reference_ms=reference_ms,
        count=count,
        code_N=code_N[kept_N].astype(np.uint16),
        net_N=net_N[kept_N].astype(np.int32),
        mass_NPR=mass_NPR,
        mean_NPRD=mean_NPRD.astype(np.float32),
    )
