"""The compiled forms of `models.counts`: one user's fold, and the counts of a batch from the bytes of its rows.

What `models.cache_kernels` does for caches, for entries that are a thousand times sparser: cells are merged in order,
where codewords are scattered into dense sums. And the counts along a timeline, which training reads. Shapes: as in
`counts`, with B users and E events.
"""

from __future__ import annotations

from inspect import unwrap

import numba
import numpy as np

from models.cache_kernels import CANCELLED, CANCELLED_WHOLLY, VANISHED
from models.memory import load_f32, load_i32, load_u16

# In place of the cell of an item that is not counted; and above all cells.
NO_CELL, BEYOND = 0, 1 << 16


def _count_loop(cell_N, net_N, mass_NR, age_ms, event_cell_EQ, event_age_ms_E, event_weight_E, rate_R):
    """Two runs of rising cells, those held and those of the events, to one: cells, net counts, masses."""
    rates, fields = rate_R.shape[0], event_cell_EQ.shape[1]
    touched_P = np.ascontiguousarray(event_cell_EQ).reshape(-1)
    order_P = np.argsort(touched_P, kind="mergesort")
    held, pairs = cell_N.shape[0], touched_P.shape[0]
    out_cell, out_net = np.empty(held + pairs, np.uint16), np.empty(held + pairs, np.int32)
    out_mass = np.empty((held + pairs, rates), np.float32)
    decay_R = np.exp(-rate_R * age_ms)
    sum_R, gross_R = np.empty(rates), np.empty(rates)
    n = p = size = 0
    while p < pairs and touched_P[order_P[p]] == NO_CELL:
        p += 1
    while n < held or p < pairs:
        cell = np.int64(cell_N[n]) if n < held else np.int64(BEYOND)
        if p < pairs:
            cell = min(cell, np.int64(touched_P[order_P[p]]))
        net = np.int64(0)
        sum_R[:] = 0.0
        gross_R[:] = 0.0
        if n < held and cell_N[n] == cell:
            net = np.int64(net_N[n])
            for r in range(rates):
                sum_R[r] = mass_NR[n, r] * decay_R[r]
                gross_R[r] = abs(sum_R[r])
            n += 1
        while p < pairs and touched_P[order_P[p]] == cell:
            event = order_P[p] // fields
            net += 1 if event_weight_E[event] > 0 else -1
            for r in range(rates):
                mass = event_weight_E[event] * np.exp(-rate_R[r] * event_age_ms_E[event])
                sum_R[r] += mass
                gross_R[r] += abs(mass)
            p += 1
        error, alive = CANCELLED_WHOLLY if net == 0 else CANCELLED, False
        for r in range(rates):
            mass = np.float32(sum_R[r])
            if abs(sum_R[r]) <= error * gross_R[r] or abs(mass) < np.float32(VANISHED):
                mass = np.float32(0.0)
            out_mass[size, r] = mass
            alive = alive or mass != 0.0
        out_cell[size], out_net[size] = cell, net
        size += alive
    return out_cell[:size].copy(), out_net[:size].copy(), out_mass[:size].copy()


count_kernel = numba.njit(cache=True, nogil=True)(unwrap(_count_loop))


def _count_rows_loop(place_B, event_N, cell_MQ, rate_R, reference_ms_B, start_B, cell_N, mass_NR, size_B):
    """`count_kernel` of each row's recent events and its counts, from the bytes; user b's begin at start_B[b].

    As of reference_ms_B; comes after `dense_kernel`, which finds it, and items beyond the table.
    """
    fields, rates = cell_MQ.shape[1], rate_R.shape[0]
    for b in range(place_B.shape[0]):
        place = place_B[b]
        size_B[b] = 0
        if place.status != 0:
            continue
        held, events = place.cell_entries, place.events
        held_cell, held_net = np.empty(held, np.uint16), np.empty(held, np.int32)
        held_mass = np.empty((held, rates), np.float32)
        for n in range(held):
            held_cell[n], held_net[n] = load_u16(place.cells + 2 * n), load_i32(place.cell_nets + 4 * n)
            for r in range(rates):
                held_mass[n, r] = load_f32(place.cell_masses + 4 * (n * rates + r))
        event_cell, event_age_ms = np.empty((events, fields), np.uint16), np.empty(events, np.int64)
        event_weight = np.empty(events, np.float32)
        for e in range(events):
            event = event_N[place.first + e]
            event_age_ms[e], event_weight[e] = reference_ms_B[b] - event.time_ms, event.weight
            for f in range(fields):
                event_cell[e, f] = cell_MQ[event.item, f]
        age_ms = reference_ms_B[b] - place.reference_ms
        cells, _, masses = count_kernel(
            held_cell, held_net, held_mass, age_ms, event_cell, event_age_ms, event_weight, rate_R
        )
        start, size_B[b] = start_B[b], cells.shape[0]
        cell_N[start : start + size_B[b]] = cells
        mass_NR[start : start + size_B[b]] = masses


count_rows_kernel = numba.njit(cache=True, nogil=True)(unwrap(_count_rows_loop))


def _timeline_loop(event_NQ, time_ms_N, weight_N, end_I, now_ms_I, bound_I, asked_CQ, cells, rate_R):
    """The counts of asked_CQ, of which impression i has bound_I[i]:bound_I[i + 1], from the events before end_I[i].

    As of the impression's now. Cells are numbered from 0. In one pass: a cell's sum is kept as of the newest of its
    events. Returns C x Q x R.
    """
    rates, fields = rate_R.shape[0], event_NQ.shape[1]
    sum_UR, newest_U = np.zeros((cells, rates)), np.zeros(cells, np.int64)
    count_CQR = np.empty((asked_CQ.shape[0], fields, rates), np.float32)
    done = 0
    for i in np.argsort(end_I, kind="mergesort"):
        for n in range(done, end_I[i]):
            for q in range(fields):
                u = event_NQ[n, q]
                age_ms = time_ms_N[n] - newest_U[u]
                newest_U[u] += max(age_ms, 0)
                for r in range(rates):
                    shrunk = np.exp(-rate_R[r] * abs(age_ms))
                    if age_ms >= 0:
                        sum_UR[u, r] = sum_UR[u, r] * shrunk + weight_N[n]
                    else:
                        sum_UR[u, r] += weight_N[n] * shrunk
        done = max(done, end_I[i])
        for c in range(bound_I[i], bound_I[i + 1]):
            for q in range(fields):
                u = asked_CQ[c, q]
                for r in range(rates):
                    shrunk = np.exp(-rate_R[r] * (now_ms_I[i] - newest_U[u]))
                    count_CQR[c, q, r] = max(sum_UR[u, r] * shrunk, 0.0)
    return count_CQR


timeline_kernel = numba.njit(cache=True, nogil=True)(unwrap(_timeline_loop))
