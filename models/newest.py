"""The newest events of a user that stand: what a ranker attends one by one, beside the cache (`models.window`).

They are taken from the recent events of the row: by event time, and of equal times those that are later in the log. A
retraction is none of them, and neither is the event that it takes back: training examples have neither.

A row has the last W events of the log at least, so these are the newest of the whole history unless more than W - L
events came late, after one that is newer than all of them; or took back others; or the row's recent events began anew
(a new epoch of the log). Then they are the newest of what is recent.

Shapes: B users, N recent events of all of them, L newest events of a user.
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import unwrap

import numba
import numpy as np
import torch

from models.cache_kernels import EVENT
from models.item_table import UNKNOWN
from models.request import History
from models.row import Fold, Row
from models.wire import recent_actions, recent_times

# The fields of an event as `models.request.History` has them, and their types.
COLUMNS = {"item": np.int64, "action": np.int64, "time_ms": np.int64, "weight": np.float32}


def newest(event_N: np.ndarray, length: int) -> np.ndarray:
    """The newest `length` events (dtype EVENT, oldest first) of one user's recent ones, given in the log's order."""
    weight_N = event_N["weight"]
    gone_N = weight_N <= 0
    for n in np.flatnonzero(weight_N < 0):
        same_N = ~gone_N & (weight_N == -weight_N[n])
        for name in ("item", "action", "time_ms"):
            same_N &= event_N[name] == event_N[name][n]
        gone_N[np.flatnonzero(same_N)[:1]] = True
    stand_N = event_N[~gone_N]
    by_time_N = stand_N[np.argsort(stand_N["time_ms"], kind="stable")]
    return by_time_N[max(0, len(by_time_N) - length) :]


def newest_of(rows: Sequence[Row | None], using: Fold) -> History:
    """Those of each row (None: absent user), `using.newest` columns: the obvious twin of the kernel."""
    column_BL = {name: np.zeros((len(rows), using.newest), dtype) for name, dtype in COLUMNS.items()}
    for b, row in enumerate(rows):
        if row is not None:
            events = newest(_events(row, len(using.table)), using.newest)
            for name, values_BL in column_BL.items():
                values_BL[b, using.newest - len(events) :] = events[name]
    return History(**{f"{name}_BL": torch.from_numpy(values_BL) for name, values_BL in column_BL.items()})


def _events(row: Row, items: int) -> np.ndarray:
    """The recent events of a row (dtype EVENT), in the log's order; items beyond the table are unknown."""
    recent = row.recent
    event_N = np.empty(len(recent), EVENT)
    event_N["time_ms"], event_N["action"] = recent_times(recent), recent_actions(recent)
    event_N["item"] = np.where(recent["item"] < items, recent["item"], UNKNOWN)
    event_N["weight"] = recent["weight"]
    return event_N


def _newest_loop(place_B, event_N, item_BL, action_BL, time_ms_BL, weight_BL):
    """`newest` of each user whose row can be used (dtypes PLACE and EVENT); zeros on the left, and for all others."""
    length = item_BL.shape[1]
    gone_N, order_N = np.zeros(event_N.shape[0], np.bool_), np.empty(event_N.shape[0], np.int64)
    for b in range(place_B.shape[0]):
        place, stand = place_B[b], 0
        first, last = place.first, place.first + place.events
        if place.status != 0:
            first = last = 0
        for n in range(first, last):
            if event_N[n].weight < 0:
                for m in range(first, last):
                    if (
                        event_N[m].weight == -event_N[n].weight
                        and event_N[m].time_ms == event_N[n].time_ms
                        and event_N[m].item == event_N[n].item
                        and event_N[m].action == event_N[n].action
                        and not gone_N[m]
                    ):
                        gone_N[m] = True
                        break
        for n in range(first, last):
            if event_N[n].weight <= 0 or gone_N[n]:
                continue
            # Most events come in the order of their times: nothing is moved then.
            at = stand
            while at > 0 and event_N[order_N[at - 1]].time_ms > event_N[n].time_ms:
                order_N[at] = order_N[at - 1]
                at -= 1
            order_N[at] = n
            stand += 1
        taken = min(stand, length)
        for to in range(length):
            if to < length - taken:
                item_BL[b, to] = action_BL[b, to] = time_ms_BL[b, to] = 0
                weight_BL[b, to] = 0.0
            else:
                event = event_N[order_N[stand - length + to]]
                item_BL[b, to], action_BL[b, to] = event.item, event.action
                time_ms_BL[b, to], weight_BL[b, to] = event.time_ms, event.weight


# unwrap: as in models.cache_kernels.
newest_kernel = numba.njit(cache=True, nogil=True)(unwrap(_newest_loop))
