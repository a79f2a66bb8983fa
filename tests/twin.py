"""The obvious twin of models.cache: the formula of its docstring over raw events, in float64, sharing no code.

Everything is compared as moments (mass, and mass times mean), against the sum of the absolute masses that went in:
where masses nearly cancel, a mean is a quotient of rounding errors and says nothing.

Shapes: as in models.cache; C = G * K codes, S = 1 + D (mass first).
"""

from __future__ import annotations

import math

import numpy as np

from models.cache import Cache, CacheSpec, EncodedEvents

# Twenty float32 roundings of mass and mean; a wrong term is off by its own size, orders above.
TOLERANCE = 3e-6
# models.cache flushes masses below 1e-30.
FLUSHED = 1e-29


def direct_moments(spec: CacheSpec, events: EncodedEvents, reference_ms: int) -> tuple[np.ndarray, np.ndarray]:
    """The moments C P R S of the events as of reference_ms, and the sums C P R of their absolute masses."""
    heads_per_group = spec.heads // spec.groups
    shape = (spec.groups * spec.codewords, heads_per_group, spec.rates)
    moment, gross = np.zeros((*shape, 1 + spec.value_width)), np.zeros(shape)
    for code_G, value_HD, time_ms, weight in zip(
        events.code_NG, events.value_NHD, events.time_ms_N, events.weight_N, strict=True
    ):
        for h in range(spec.heads):
            g, p = divmod(h, heads_per_group)
            for r in range(spec.rates):
                mass = float(weight) * math.exp(-spec.rate_HR[h, r] * float(reference_ms - time_ms))
                moment[g * spec.codewords + int(code_G[g]), p, r] += mass * np.array([1.0, *value_HD[h].tolist()])
                gross[g * spec.codewords + int(code_G[g]), p, r] += abs(mass)
    return moment, gross


def moments_of(cache: Cache) -> np.ndarray:
    """The cache's own moments by code, C P R S; zeros where it holds nothing."""
    spec = cache.spec
    shape = (spec.groups * spec.codewords, spec.heads // spec.groups, spec.rates, 1 + spec.value_width)
    moment = np.zeros(shape)
    mass_NPR = cache.mass_NPR.astype(np.float64)
    moment[cache.code_N] = np.concatenate([mass_NPR[..., None], mass_NPR[..., None] * cache.mean_NPRD], axis=-1)
    return moment


def assert_formula(cache: Cache, events: EncodedEvents) -> None:
    """The cache is the formula over these raw events, as of its own reference time."""
    assert_sound(cache)
    wanted, gross = direct_moments(cache.spec, events, cache.reference_ms)
    assert cache.count == len(events)
    assert len(events) == 0 or cache.reference_ms == int(events.time_ms_N.max())
    _assert_close(moments_of(cache), wanted, gross, float(np.abs(events.value_NHD).max(initial=0.0)))


def assert_same_cache(found: Cache, wanted: Cache) -> None:
    """The same cache to float rounding. For caches without near-cancelled masses (else: assert_formula)."""
    assert_sound(found)
    assert_sound(wanted)
    assert found.spec.checkpoint_id == wanted.spec.checkpoint_id
    assert (found.reference_ms, found.count) == (wanted.reference_ms, wanted.count)
    a, b = moments_of(found), moments_of(wanted)
    gross = np.maximum(np.abs(a[..., 0]), np.abs(b[..., 0]))
    _assert_close(a, b, gross, float(np.abs(wanted.mean_NPRD).max(initial=0.0)))


def assert_sound(cache: Cache) -> None:
    """What every cache promises: rising codes, finite numbers, no entry without mass, no mean without mass."""
    assert (np.diff(cache.code_N.astype(np.int64)) > 0).all()
    assert np.isfinite(cache.mass_NPR).all()
    assert np.isfinite(cache.mean_NPRD).all()
    assert (cache.mass_NPR != 0).any(axis=(1, 2)).all()
    assert (cache.mean_NPRD[cache.mass_NPR == 0] == 0).all()
    assert (cache.code_N.dtype, cache.mass_NPR.dtype, cache.mean_NPRD.dtype) == (np.uint16, np.float32, np.float32)


def _assert_close(found: np.ndarray, wanted: np.ndarray, gross: np.ndarray, value_max: float) -> None:
    allowed = np.repeat((TOLERANCE * gross + FLUSHED)[..., None], found.shape[-1], axis=-1)
    allowed[..., 1:] *= max(1.0, value_max)
    error = np.abs(found - wanted)
    worst = np.unravel_index(np.argmax(error - allowed), error.shape)
    assert (error <= allowed).all(), f"moment (C, P, R, S) {worst} is {found[worst]!r}, not {wanted[worst]!r}"
