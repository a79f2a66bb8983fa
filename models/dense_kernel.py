"""The compiled loop that makes tensors of a batch's rows, each row's bytes checked, folded and written at once.

Several threads may run it on one batch: they take the rows in turns. Shapes: as in `cache`, with B users, M items, A
actions and L newest events.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from inspect import unwrap

import numba
import numpy as np

from models.cache_kernels import EVENT, VANISHED, settle
from models.count_kernels import count_row
from models.item_table import UNKNOWN
from models.memory import copy, load_f32, load_i32, load_u16, prefetch
from models.newest import newest_kernel
from models.row_places import RECORD_BYTES, place_row
from models.short_vectors import add_product, product, quotient
from models.turns import next_row, row_done

CACHE_LINE_BYTES = 64


@lru_cache(maxsize=8)
def dense_kernel(heads: int, rates: int, width: int) -> Callable[..., None]:
    """The compiled `fold` of a batch into tensors, for P heads of a group, R rates and D values.

    The compiler knows these numbers: the inner loops become a few instructions, which takes a third off.
    """

    def dense_loop(
        turn_4,
        address_P,
        size_P,
        identity_2,
        size_3,
        limit_3,
        code_MG,
        value_MHD,
        action_value_AHD,
        rate_GPR,
        cell_MQ,
        count_rate_R,
        place_B,
        mass_BHKR,
        mean_BHKRD,
        reference_ms_B,
        count_B,
        unknown_B,
        item_BL,
        action_BL,
        time_ms_BL,
        weight_BL,
        cell_at_B,
        cell_mass_at_B,
        cells_B,
    ):
        """`cache.fold` of each row's recent events into its entries, from the bytes straight into tensors.

        Of the rows whose turn it is (`next_row`): they are placed first (`place_row`), and a user whose status is not 0
        gets zeros. Entries are copied with their mass decayed; those that recent events enter are written over, by way
        of moments. Every number of the tensors is written. Then the newest events, and the counts, to where these
        addresses say, where the checkpoint has them.
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
        event_N, b = np.empty(64, EVENT), np.int64(-1)
        while True:
            if b >= 0:
                row_done(turn_4)
            b = next_row(turn_4)
            if b < 0:
                break
            if size_P[2 * b + 1] // RECORD_BYTES > event_N.shape[0]:
                event_N = np.empty(size_P[2 * b + 1] // RECORD_BYTES, EVENT)
            place_row(b, 0, address_P, size_P, identity_2, size_3, limit_3, place_B, event_N)
            place = place_B[b]
            reference_ms_B[b] = count_B[b] = unknown_B[b] = 0
            if place.status != 0:
                mass_BHKR[b] = 0.0
                mean_BHKRD[b] = 0.0
                item_BL[b] = action_BL[b] = time_ms_BL[b] = 0
                weight_BL[b] = 0.0
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
                settle(mass_E, gross_E, total_X, s, net_S[s], entries, width)
                g, k = group_S[s], code - group_S[s] * codewords
                for p in range(heads):
                    for r in range(rates):
                        e = np.uint32((s * heads + p) * rates + r)
                        to = np.uint32(((g * heads + p) * codewords + k) * rates + r)
                        mass = mass_E[e]
                        if abs(np.float32(mass)) >= np.float32(VANISHED):
                            mass_X[to] = mass
                            quotient(mean + 4 * width * to, mass, total + 8 * width * e, width)
                        else:
                            mass_X[to] = 0.0
                            mean_X[to * width : (to + 1) * width] = 0.0
            copy(mass_address + b * 4 * mass_X.shape[0], mass_X.ctypes.data, 4 * mass_X.shape[0])
            copy(mean_address + b * 4 * mean_X.shape[0], mean, 4 * mean_X.shape[0])
            reference_ms_B[b], count_B[b] = reference_ms, place.count + place.events
            if item_BL.shape[1] > 0:
                # Now that items beyond the table are the unknown one.
                one = slice(b, b + 1)
                newest_kernel(place_B[one], event_N, item_BL[one], action_BL[one], time_ms_BL[one], weight_BL[one])
            if size_3[2] > 0:
                cells_B[b] = count_row(
                    place, event_N, cell_MQ, count_rate_R, reference_ms, cell_at_B[b], cell_mass_at_B[b]
                )

    # Errors as numpy's: a check of every divisor would keep the compiler from vectors.
    return numba.njit(cache=True, nogil=True, error_model="numpy")(unwrap(dense_loop))
