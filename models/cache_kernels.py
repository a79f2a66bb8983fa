"""The compiled forms of the algebra that `models.cache` states: one user's fold, and the caches of a batch as tensors.

Shapes: as in `cache`, with B users, M items and A actions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import unwrap

import numba
import numpy as np

from models.item_table import UNKNOWN
from models.memory import copy, load_f32, load_i32, load_u16, prefetch
from models.short_vectors import add_product, product, quotient

# A sum this much smaller than its terms is rounding error of float32 terms, not mass; where the net count says that
# every event met its retraction, the rounding of many folds may have added up.
CANCELLED, CANCELLED_WHOLLY = 1e-6, 1e-3
# Below this a mass is flushed: it is 30 orders under the newest event's and float32 would go denormal.
VANISHED = 1e-30
CACHE_LINE_BYTES = 64

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


def _settle(mass_E, gross_E, total_X, code, net, entries, width):
    """What cancelled to rounding error is nothing. `entries` are of one code: P x R."""
    error = CANCELLED_WHOLLY if net == 0 else CANCELLED
    for m in range(entries):
        e = np.uint32(code * entries + m)
        if abs(mass_E[e]) <= error * gross_E[e] or abs(mass_E[e]) < VANISHED:
            mass_E[e] = 0.0
            for d in range(width):
                total_X[np.uint32(e * width) + d] = 0.0


# Inlined, because a call passes each array as ten arguments.
_settle = numba.njit(inline="always")(unwrap(_settle))


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
        _settle(mass_E, gross_E, total_X, code, net[code], entries, width)
        for p in range(heads):
            for r in range(rates):
                e = np.uint32((code * heads + p) * rates + r)
                moment[n, p, r, 0] = mass_E[e]
                for d in range(width):
                    moment[n, p, r, 1 + d] = total_X[np.uint32(e * width) + d]
    return codes, net[codes], moment


# unwrap: in tests the functions of this module carry run-time shape checks, which numba cannot compile.
fold_kernel = numba.njit(cache=True)(unwrap(_fold_loop))


@lru_cache(maxsize=8)
def dense_kernel(heads: int, rates: int, width: int) -> Callable[..., None]:
    """The compiled `fold` of a batch into tensors, for P heads of a group, R rates and D values.

    The compiler knows these numbers: the inner loops become a few instructions, which takes a third off.
    """

    def dense_loop(
        place_B,
        event_N,
        code_MG,
        value_MHD,
        action_value_AHD,
        rate_GPR,
        mass_BHKR,
        mean_BHKRD,
        reference_ms_B,
        count_B,
        unknown_B,
    ):
        """`cache.fold` of each row's recent events into its entries, from the bytes straight into tensors.

        place_B, event_N: dtypes PLACE and EVENT; a user whose status is not 0 gets zeros. Entries are
        copied with their mass decayed; those that recent events enter are written over, by way of moments. Every number
        of the tensors is written.
        """
        groups, codewords = rate_GPR.shape[0], mean_BHKRD.shape[2]
        entries, codes = heads * rates, groups * codewords
        # One user's numbers are put together in the nearest cache, and copied at once into memory that is in none.
        mass_X, mean_X = np.empty(codes * entries, np.float32), np.empty(codes * entries * width, np.float32)
        mass_address, mean_address = mass_BHKR.ctypes.data, mean_BHKRD.ctypes.data
        # A touched code has a slot: sums lie close together, however far apart the codes are.
        slot_C, entry_C = np.full(codes, -1, np.int32), np.empty(codes, np.int32)
        code_S, group_S, net_S = np.empty(codes + 1, np.int64), np.empty(codes + 1, np.int64), np.empty(codes, np.int64)
        mass_E, gross_E = np.empty(codes * entries), np.empty(codes * entries)
        total_X = np.empty(codes * entries * width)
        decay_GPR = np.empty((groups, heads, rates))
        mean, total = mean_X.ctypes.data, total_X.ctypes.data
        code_address, code_bytes = code_MG.ctypes.data, 2 * groups
        value_address, value_bytes = value_MHD.ctypes.data, 4 * groups * heads * width
        action_address = action_value_AHD.ctypes.data
        for b in range(place_B.shape[0]):
            place = place_B[b]
            reference_ms_B[b] = count_B[b] = unknown_B[b] = 0
            if place.status != 0:
                mass_BHKR[b] = 0.0
                mean_BHKRD[b] = 0.0
                continue
            mass_X[:] = 0.0
            mean_X[:] = 0.0
            reference_ms, slots = place.reference_ms, 0
            first, last = place.first, place.first + place.events
            for n in range(first, last):
                reference_ms = max(reference_ms, event_N[n].time_ms)
                if event_N[n].item >= code_MG.shape[0]:
                    event_N[n].item = UNKNOWN
                    unknown_B[b] += 1
                item = event_N[n].item
                prefetch(code_address + item * code_bytes)
                for line in range(0, value_bytes, CACHE_LINE_BYTES):
                    prefetch(value_address + item * value_bytes + line)
                prefetch(value_address + (item + 1) * value_bytes - 1)
            for n in range(first, last):
                for g in range(groups):
                    code = np.uint32(g * codewords + np.int64(code_MG[event_N[n].item, g]))
                    # Without a branch, which could not be foretold.
                    slot = slot_C[code]
                    code_S[slots], group_S[slots] = code, g
                    slot_C[code] = slots if slot < 0 else slot
                    slots += slot < 0
            age_ms = reference_ms - place.reference_ms
            for g in range(groups):
                for p in range(heads):
                    for r in range(rates):
                        decay_GPR[g, p, r] = np.exp(-rate_GPR[g, p, r] * age_ms)
            entry_C[:] = -1
            g, end = 0, codewords
            for n in range(place.entries):
                code = np.int64(load_u16(place.codes + 2 * n))
                # Codes rise: no division is needed to know their group.
                while code >= end:
                    g, end = g + 1, end + codewords
                entry_C[np.uint32(code)] = n
                for p in range(heads):
                    to = np.uint32(((g * heads + p) * codewords + code + codewords - end) * rates)
                    at = (n * heads + p) * rates
                    for r in range(rates):
                        mass = load_f32(place.masses + 4 * (at + r)) * decay_GPR[g, p, r]
                        gone = abs(mass) < VANISHED or abs(np.float32(mass)) < np.float32(VANISHED)
                        mass_X[to + r] = 0.0 if gone else mass
                        if not gone:
                            row_bytes = 4 * width
                            copy(mean + row_bytes * (to + r), place.means + row_bytes * (at + r), row_bytes)
            for s in range(slots):
                code, g = code_S[s], group_S[s]
                n = entry_C[np.uint32(code)]
                net_S[s] = load_i32(place.nets + 4 * n) if n >= 0 else 0
                for p in range(heads):
                    for r in range(rates):
                        e = np.uint32((s * heads + p) * rates + r)
                        if n >= 0:
                            at = (n * heads + p) * rates + r
                            mass = load_f32(place.masses + 4 * at) * decay_GPR[g, p, r]
                            mass_E[e], gross_E[e] = mass, abs(mass)
                            product(total + 8 * width * e, mass, place.means + 4 * width * at, width)
                        else:
                            mass_E[e] = gross_E[e] = 0.0
                            total_X[e * width : (e + 1) * width] = 0.0
            for n in range(first, last):
                item, action, weight = event_N[n].item, event_N[n].action, event_N[n].weight
                value, action_value = value_address + item * value_bytes, action_address + action * value_bytes
                event_age_ms = reference_ms - event_N[n].time_ms
                for g in range(groups):
                    s = np.int64(slot_C[np.uint32(g * codewords + np.int64(code_MG[item, g]))])
                    net_S[s] += 1 if weight > 0 else -1
                    for p in range(heads):
                        own = 4 * width * (g * heads + p)
                        for r in range(rates):
                            mass = weight * np.exp(-rate_GPR[g, p, r] * event_age_ms)
                            e = np.uint32((s * heads + p) * rates + r)
                            mass_E[e] += mass
                            gross_E[e] += abs(mass)
                            add_product(total + 8 * width * e, mass, value + own, action_value + own, width)
            for s in range(slots):
                code = code_S[s]
                slot_C[code] = -1
                _settle(mass_E, gross_E, total_X, s, net_S[s], entries, width)
                g, k = group_S[s], code - group_S[s] * codewords
                for p in range(heads):
                    for r in range(rates):
                        e = np.uint32((s * heads + p) * rates + r)
                        to = np.uint32(((g * heads + p) * codewords + k) * rates + r)
                        mass = mass_E[e]
                        if abs(np.float32(mass)) >= np.float32(VANISHED):
                            mass_X[to] = mass
                            quotient(mean + 4 * width * to, total + 8 * width * e, mass, width)
                        else:
                            mass_X[to] = 0.0
                            mean_X[to * width : (to + 1) * width] = 0.0
            copy(mass_address + b * 4 * mass_X.shape[0], mass_X.ctypes.data, 4 * mass_X.shape[0])
            copy(mean_address + b * 4 * mean_X.shape[0], mean, 4 * mean_X.shape[0])
            reference_ms_B[b], count_B[b] = reference_ms, place.count + place.events

    # Errors as numpy's: a check of every divisor would keep the compiler from vectors.
    return numba.njit(cache=True, nogil=True, error_model="numpy")(unwrap(dense_loop))
