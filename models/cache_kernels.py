"""The compiled form of the algebra that `models.cache` states, one user's fold, and what others like it share.

Shapes: as in `cache`.
"""

from __future__ import annotations

from inspect import unwrap

import numba
import numpy as np

# A sum this much smaller than its terms is rounding error of float32 terms, not mass; where the net count says that
# every event met its retraction, the rounding of many folds may have added up.
CANCELLED, CANCELLED_WHOLLY = 1e-6, 1e-3
# Below this a mass is flushed: it is 30 orders under the newest event's and float32 would go denormal.
VANISHED = 1e-30

# A row that is somewhere in memory: the addresses of its entries' codes (u16), net counts (i32), masses and means
# (f32), its recent events' places among those of the batch, the same of its counts, and what it says of itself.
# status 0: it can be used.
PLACE = np.dtype(
    [
        (name, "<i8")
        for name in (
            *("status", "codes", "nets", "masses", "means", "entries", "first", "events"),
            *("cells", "cell_nets", "cell_masses", "cell_entries"),
            *("reference_ms", "count", "epoch", "offset", "revision"),
        )
    ]
)
# A recent event; its item may be beyond the table, its action is not.
EVENT = np.dtype([("time_ms", "<i8"), ("item", "<i8"), ("action", "<i4"), ("weight", "<f4")])


def settle(mass_E, gross_E, total_X, code, net, entries, width):
    """What cancelled to rounding error is nothing. `entries` are of one code: P x R."""
    error = CANCELLED_WHOLLY if net == 0 else CANCELLED
    for m in range(entries):
        e = np.uint32(code * entries + m)
        if abs(mass_E[e]) <= error * gross_E[e] or abs(mass_E[e]) < VANISHED:
            mass_E[e] = 0.0
            for d in range(width):
                total_X[np.uint32(e * width) + d] = 0.0


# Inlined, because a call passes each array as ten arguments.
settle = numba.njit(inline="always")(unwrap(settle))


def _fold_loop(
    code_N,
    net_N,
    mass_NPR,
    mean_NPRD,
    age_ms,
    event_code_NG,
    event_value_NHD,
    event_age_ms_N,
    event_weight_N,
    rate_GPR,
    codewords,
):
    """Scatter the state and the events into dense sums, then gather the touched codewords in order."""
    groups, heads, rates = rate_GPR.shape
    width, entries = mean_NPRD.shape[3], heads * rates
    mass_E, gross_E = np.zeros(groups * codewords * entries), np.zeros(groups * codewords * entries)
    total_X = np.zeros(groups * codewords * entries * width)
    net = np.zeros(groups * codewords, np.int64)
    touched = np.zeros(groups * codewords, np.bool_)
    for n in range(code_N.shape[0]):
        code = np.int64(code_N[n])
        touched[code] = True
        net[code] = net_N[n]
        for p in range(heads):
            for r in range(rates):
                mass = mass_NPR[n, p, r] * np.exp(-rate_GPR[code // codewords, p, r] * age_ms)
                e = np.uint32((code * heads + p) * rates + r)
                mass_E[e], gross_E[e] = mass, abs(mass)
                for d in range(width):
                    total_X[np.uint32(e * width) + d] = mass * mean_NPRD[n, p, r, d]
    value_HD = np.empty((groups * heads, width))
    for n in range(event_code_NG.shape[0]):
        weight, age_ms = event_weight_N[n], event_age_ms_N[n]
        value_HD[:] = event_value_NHD[n]
        for g in range(groups):
            code = g * codewords + np.int64(event_code_NG[n, g])
            touched[code] = True
            net[code] += 1 if weight > 0 else -1
            for p in range(heads):
                for r in range(rates):
                    mass = weight * np.exp(-rate_GPR[g, p, r] * age_ms)
                    e = np.uint32((code * heads + p) * rates + r)
                    x, h = np.uint32(e * width), np.uint32(g * heads + p)
                    mass_E[e] += mass
                    gross_E[e] += abs(mass)
                    for d in range(width):
                        total_X[x + d] += mass * value_HD[h, d]
    codes = np.flatnonzero(touched)
    moment = np.empty((codes.shape[0], heads, rates, 1 + width))
    for n, code in enumerate(codes):
        settle(mass_E, gross_E, total_X, code, net[code], entries, width)
        for p in range(heads):
            for r in range(rates):
                e = np.uint32((code * heads + p) * rates + r)
                moment[n, p, r, 0] = mass_E[e]
                for d in range(width):
                    moment[n, p, r, 1 + d] = total_X[np.uint32(e * width) + d]
    return codes, net[codes], moment


# unwrap: in tests the functions of this module carry run-time shape checks, which numba cannot compile.
fold_kernel = numba.njit(cache=True)(unwrap(_fold_loop))
