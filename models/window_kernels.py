"""The compiled form of `models.window` on a CPU, but for its products of matrices.

Shapes: as in `models.activation_unit`, of one user; A actions, K buckets of age, M items, X = L * J.
"""

from __future__ import annotations

from inspect import unwrap

import numba
import numpy as np

from models.item_table import UNKNOWN


def _events_loop(
    item_L,
    action_L,
    time_ms_L,
    now_ms,
    vector_Md,
    action_Ad,
    age_KJ,
    meets_Jd,
    product_Jd,
    alone_Jd,
    bias_J,
    value_Vd,
    matrix_Xd,
    bias_X,
    value_LV,
):
    """What the events are to any candidate: rows and biases of their hidden numbers, and their values.

    Items beyond the table are read as the unknown one. Raises IndexError for an action that has no vector.
    """
    hidden, width = product_Jd.shape
    event_d = np.empty(width, np.float32)
    for n in range(item_L.shape[0]):
        item, action = item_L[n], action_L[n]
        if not 0 <= item < vector_Md.shape[0]:
            item = UNKNOWN
        if not 0 <= action < action_Ad.shape[0]:
            raise IndexError("an action that has no vector")
        for d in range(width):
            event_d[d] = vector_Md[item, d] + action_Ad[action, d]
        # As models.temporal.age_bucket.
        octaves = np.log2(1.0 + max(now_ms - time_ms_L[n], 0) / 1000.0)
        bucket = min(np.int64(2.0 * octaves), age_KJ.shape[0] - 1)
        for j in range(hidden):
            x = n * hidden + j
            alone = np.float32(0.0)
            for d in range(width):
                matrix_Xd[x, d] = meets_Jd[j, d] + product_Jd[j, d] * event_d[d]
                alone += alone_Jd[j, d] * event_d[d]
            bias_X[x] = alone + bias_J[j] + age_KJ[bucket, j]
        for v in range(value_LV.shape[1]):
            value = np.float32(0.0)
            for d in range(width):
                value += value_Vd[v, d] * event_d[d]
            value_LV[n, v] = value


def _weights_loop(hidden_CX, slope, out_J, bias, weight_L, unit_CL):
    """What each event counts for each candidate, from the hidden numbers of the pair."""
    hidden = out_J.shape[0]
    for c in range(hidden_CX.shape[0]):
        for n in range(weight_L.shape[0]):
            unit = bias
            for j in range(hidden):
                h = hidden_CX[c, n * hidden + j]
                unit += out_J[j] * (max(h, np.float32(0.0)) + slope * min(h, np.float32(0.0)))
            unit_CL[c, n] = unit * max(weight_L[n], np.float32(0.0))


# Sums in any order, so that the compiler makes vectors of them.
_ANY_ORDER = {"reassoc", "contract", "nsz"}
events_kernel = numba.njit(cache=True, nogil=True, fastmath=_ANY_ORDER)(unwrap(_events_loop))
weights_kernel = numba.njit(cache=True, nogil=True, fastmath=_ANY_ORDER)(unwrap(_weights_loop))
