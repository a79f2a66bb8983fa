"""Draws that depend on their keys alone, and items drawn by their popularity in a period, within a group of items.

A draw is a hash of its keys (seed, user, time, ...), so it is the same however many users are drawn for at once, in
whatever order and on whatever cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# Stands for all periods, and for all groups, where a period or a group has no events.
ALL = -1


def uniform(seed: int, *keys: np.ndarray) -> np.ndarray:
    """Uniform numbers in [0, 1), one for each element of the keys (int64, broadcast against each other).

    The mixing function is SplitMix64's (Steele, Lea and Flood 2014), over the keys in turn.
    """
    state = _mix(np.array([seed]).astype(np.uint64))
    for key in keys:
        state = _mix(state ^ _mix(np.atleast_1d(key).astype(np.int64).astype(np.uint64)))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True, kw_only=True, slots=True)
class Popularity:
    """Items by period and group with their counts.

    Shapes: S (period, group) pairs in order, the S-th owning items bound_S[s]:bound_S[s + 1]; J items over all pairs,
    with the running sum of their counts.
    """

    period_S: np.ndarray
    group_S: np.ndarray
    bound_S: np.ndarray
    item_J: np.ndarray
    cumulative_J: np.ndarray
    period_ms: int

    def draw(self, now_ms_N: np.ndarray, group_N: np.ndarray, uniform_N: np.ndarray) -> np.ndarray:
        """One item for each uniform number: by its count in the period of now_ms, within the group.

        Where the period knows nothing of the group, by its count in the group over all periods.
        """
        place_N = self._place(now_ms_N // self.period_ms, group_N)
        first_N, after_N = self.bound_S[place_N], self.bound_S[place_N + 1]
        before_N = np.r_[0.0, self.cumulative_J][first_N]
        total_N = self.cumulative_J[after_N - 1] - before_N
        drawn_N = np.searchsorted(self.cumulative_J, before_N + uniform_N * total_N, side="right")
        # The product may round up to the end of the pair's items.
        return self.item_J[np.minimum(drawn_N, after_N - 1)]

    def _place(self, period_N: np.ndarray, group_N: np.ndarray) -> np.ndarray:
        """Which pair to draw from: (period, group), else (all, group), else (all, all)."""
        groups = max(int(self.group_S.max()), int(group_N.max(initial=0))) + 2
        pair_S = (self.period_S + 1) * groups + self.group_S + 1
        place_N = np.full(group_N.shape, -1)
        for period, group in ((period_N, group_N), (ALL, group_N), (ALL, ALL)):
            pair_N = np.broadcast_to((np.asarray(period) + 1) * groups + np.asarray(group) + 1, place_N.shape)
            found_N = np.minimum(np.searchsorted(pair_S, pair_N), len(pair_S) - 1)
            place_N = np.where((place_N < 0) & (pair_S[found_N] == pair_N), found_N, place_N)
        return place_N


def count_popularity(
    period_C: np.ndarray, item_C: np.ndarray, count_C: np.ndarray, group_M: np.ndarray, period_ms: int
) -> Popularity:
    """Popularity from C counts of (period, item); the unknown item 0 is never drawn.

    Shapes: M items. group_M: the group of each item, 0 or more. Without a single count every item counts once.
    """
    known_C = item_C > 0
    period_C, item_C, count_C = period_C[known_C].astype(np.int64), item_C[known_C].astype(np.int64), count_C[known_C]
    if len(item_C) == 0:
        item_C = np.arange(1, len(group_M))
        period_C, count_C = np.zeros(len(item_C), np.int64), np.ones(len(item_C))
    group_C, every_C = group_M[item_C].astype(np.int64), np.full(len(item_C), ALL)
    # Each count three times: in its period and group, in its group over all periods, and over all.
    period, group = np.concatenate([period_C, every_C, every_C]), np.concatenate([group_C, group_C, every_C])
    item, count = np.tile(item_C, 3), np.tile(count_C, 3).astype(np.float64)
    order = np.lexsort((item, group, period))
    period, group, item, count = period[order], group[order], item[order], count[order]
    new_item = np.flatnonzero(_changes(period, group, item))
    count = np.add.reduceat(count, new_item)
    period, group, item = period[new_item], group[new_item], item[new_item]
    new_pair = np.flatnonzero(_changes(period, group))
    return Popularity(
        period_S=period[new_pair],
        group_S=group[new_pair],
        bound_S=np.r_[new_pair, len(item)],
        item_J=item,
        cumulative_J=np.cumsum(count),
        period_ms=period_ms,
    )


def _changes(*columns: np.ndarray) -> np.ndarray:
    """Where a row differs from the one before it in any column; the first does."""
    changed = np.ones(len(columns[0]), bool)
    changed[1:] = np.logical_or.reduce([np.diff(column) != 0 for column in columns])
    return changed
