"""The compiled forms of `models.counts`: one user's fold, and the counts of a row from its bytes.

What `models.cache_kernels` does for caches, for entries that are a thousand times sparser: cells are merged in order,
where codewords are scattered into dense sums. And the counts along a timeline, which training reads. Shapes: as in
`counts`, with B users and E events.
"""

from __future__ import annotations

from inspect import unwrap

import numba
import numpy as np

from models.cache_kernels import CANCELLED, CANCELLED_WHOLLY, VANISHED
from models.memory import copy

# In place of the cell of an item that is not counted; and above all cells.
NO_CELL, BEYOND = 0, 1 << 16
# Entries whose decays are written down side by side.
RUN = 64


def _decayed_loop(mass_NR, decay_R):
    """The masses decayed, and how many numbers of them vanished. In long runs, of which the compiler makes vectors."""
    rates, mass_X = decay_R.shape[0], np.ascontiguousarray(mass_NR).reshape(-1)
    out_X, decay_Y, vanished = np.empty(mass_X.shape[0], np.float32), np.empty(RUN * rates), 0
    for y in range(RUN * rates):
        decay_Y[y] = decay_R[y % rates]
    for first in range(0, mass_X.shape[0], RUN * rates):
        for y in range(min(RUN * rates, mass_X.shape[0] - first)):
            mass = np.float32(mass_X[first + y] * decay_Y[y])
            gone = abs(mass) < np.float32(VANISHED)
            out_X[first + y] = np.float32(0.0) if gone else mass
            vanished += gone
    return out_X.reshape(mass_NR.shape), vanished


_decayed = numba.njit(cache=True, nogil=True)(unwrap(_decayed_loop))


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
    decayed_NR, vanished = _decayed(mass_NR, decay_R)
    n = p = size = 0
    while p < pairs and touched_P[order_P[p]] == NO_CELL:
        p += 1
    while n < held or p < pairs:
        cell = np.int64(touched_P[order_P[p]]) if p < pairs else np.int64(BEYOND)
        # Most cells have no new event: nothing can cancel, and their masses are only decayed.
        untouched = n + np.searchsorted(cell_N[n:], cell)
        if untouched > n and not vanished:
            to = size + untouched - n
            out_cell[size:to], out_net[size:to] = cell_N[n:untouched], net_N[n:untouched]
            out_mass[size:to] = decayed_NR[n:untouched]
            n, size = untouched, to
        while n < untouched:
            out_cell[size], out_net[size], out_mass[size] = cell_N[n], net_N[n], decayed_NR[n]
            n, size = n + 1, size + decayed_NR[n].any()
        if p == pairs:
            break
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


def _count_row(place, event_N, cell_MQ, rate_R, reference_ms, cell_at, mass_at):
    """`count_kernel` of a row's recent events and its counts, from the bytes, to these addresses; how many cells.

    As of reference_ms. Comes when items beyond the table are the unknown one (`models.dense_kernel`).
    """
    fields, rates = cell_MQ.shape[1], rate_R.shape[0]
    held, events = place.cell_entries, place.events
    held_cell, held_net = np.empty(held, np.uint16), np.empty(held, np.int32)
    held_mass = np.empty((held, rates), np.float32)
    copy(held_cell.ctypes.data, place.cells, 2 * held)
    copy(held_net.ctypes.data, place.cell_nets, 4 * held)
    copy(held_mass.ctypes.data, place.cell_masses, 4 * rates * held)
    event_cell, event_age_ms = np.empty((events, fields), np.uint16), np.empty(events, np.int64)
    event_weight = np.empty(events, np.float32)
    for e in range(events):
        event = event_N[place.first + e]
        event_age_ms[e], event_weight[e] = reference_ms - event.time_ms, event.weight
        for f in range(fields):
            event_cell[e, f] = cell_MQ[event.item, f]
    age_ms = reference_ms - place.reference_ms
    cells, _, masses = count_kernel(
        held_cell, held_net, held_mass, age_ms, event_cell, event_age_ms, event_weight, rate_R
    )
    copy(cell_at, cells.ctypes.data, 2 * cells.shape[0])
    copy(mass_at, masses.ctypes.data, 4 * rates * cells.shape[0])
    return cells.shape[0]


count_row = numba.njit(cache=True, nogil=True)(unwrap(_count_row))


def _read_counts_loop(item_BC, cell_MQ, cell_BN, mass_BNR, age_ms_B, rate_R, count_BCX):
    """`models.attention.read_counts` of items: each one's counts at this age of the masses, by bisection.

    Raises IndexError for an item beyond the cells.
    """
    rates, entries = rate_R.shape[0], cell_BN.shape[1]
    for b in range(item_BC.shape[0]):
        decay_R = np.exp(-rate_R * age_ms_B[b])
        for c in range(item_BC.shape[1]):
            if not 0 <= item_BC[b, c] < cell_MQ.shape[0]:
                raise IndexError("an item beyond the table of cells")
            for q in range(cell_MQ.shape[1]):
                cell, at, beyond = cell_MQ[item_BC[b, c], q], 0, entries
                while at < beyond:
                    middle = (at + beyond) >> 1
                    lower = cell_BN[b, middle] < cell
                    at, beyond = (middle + 1 if lower else at), (beyond if lower else middle)
                found = at < entries and cell_BN[b, at] == cell
                for r in range(rates):
                    count_BCX[b, c, q * rates + r] = max(mass_BNR[b, at, r] * decay_R[r], 0.0) if found else 0.0


read_counts_kernel = numba.njit(cache=True, nogil=True)(unwrap(_read_counts_loop))


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
