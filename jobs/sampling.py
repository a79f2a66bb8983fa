"""The sampled protocols, raw and fair: the positives of baskets, and the negatives drawn to stand beside them.

See jobs.protocols for what they are. Draws are tried for many baskets at once; of what was tried, the first that fit
are kept.

Shapes: N events, B baskets, P positives, R rows (a basket, or a slice of one), T tries, C candidates, M items.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from jobs.baskets import NEGATIVES, POSITIVES, Baskets, Events, ExamplePlan, Touches, rank
from jobs.popularity import Popularity, uniform

# What was drawn twice or may not be drawn is left out: a few times the negatives of a basket.
TRIES = 96
NOVEL, REPEAT = 0, 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Items:
    """What is known of M items: how popular each is, and its group; row 0 is the unknown item."""

    popularity: Popularity
    group_M: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Candidates:
    """Candidates of all baskets: which basket, item, label."""

    basket_C: np.ndarray
    item_C: np.ndarray
    label_C: np.ndarray

    @classmethod
    def joined(cls, parts: Sequence[Candidates]) -> Candidates:
        """In the order of baskets, positives first."""
        none = np.zeros(0, np.int64)
        basket_C = np.concatenate([none, *(part.basket_C for part in parts)])
        item_C = np.concatenate([none, *(part.item_C for part in parts)])
        label_C = np.concatenate([none, *(part.label_C for part in parts)])
        order = np.lexsort((-label_C, basket_C))
        return cls(basket_C=basket_C[order], item_C=item_C[order], label_C=label_C[order])


@dataclass(frozen=True, kw_only=True, slots=True)
class Positives:
    """P positives of baskets `of`, each basket's in the order of a draw; all items of baskets as (basket, item)."""

    of: Baskets
    basket_P: np.ndarray
    item_P: np.ndarray
    rank_P: np.ndarray
    repeat_P: np.ndarray
    inside: np.ndarray


def find_positives(events: Events, of: Baskets, touches: Touches, plan: ExamplePlan) -> Positives:
    size_B, items = of.end_B - of.start_B, len(touches.group_M)
    basket = np.repeat(np.arange(len(of)), size_B)
    place = np.arange(len(basket)) + np.repeat(of.start_B - (np.cumsum(size_B) - size_B), size_B)
    item = events.item_N[place].astype(np.int64)
    inside = np.unique((basket * items + item)[item > 0])
    basket, item = inside // items, inside % items
    ranks = rank(basket, uniform(plan.seed, POSITIVES, of.key_B[basket], of.now_ms_B[basket], item))
    kept = ranks < plan.positives
    basket, item = basket[kept], item[kept]
    return Positives(
        of=of,
        basket_P=basket,
        item_P=item,
        rank_P=ranks[kept],
        repeat_P=touches.before(of.user_B[basket], item, of.start_B[basket]),
        inside=inside,
    )


def raw(positives: Positives, touches: Touches, items: Items, plan: ExamplePlan) -> Candidates:
    """So many negatives for each basket, by popularity."""
    rows = Rows.of(positives, np.zeros(len(positives.item_P), np.int64))
    negative_RT, fit_RT = _negatives(rows, touches, items, plan.seed)
    count_R = np.minimum(fit_RT.sum(1), plan.negatives)
    return _kept(rows, rows.size_R * (count_R > 0), negative_RT, fit_RT, count_R)


def fair(positives: Positives, touches: Touches, items: Items, plan: ExamplePlan) -> Candidates:
    """So many negatives for each positive, seen before if it was and not if it was not; or no positive."""
    each = plan.negatives // plan.positives
    rows = Rows.of(positives, positives.repeat_P.astype(np.int64))
    negative_RT, fit_RT = _negatives(rows, touches, items, plan.seed)
    user_R, start_R = (x[rows.basket_R][:, None] for x in (positives.of.user_B, positives.of.start_B))
    fit_RT &= touches.before(user_R, negative_RT, start_R) == (rows.slice_R == REPEAT)[:, None]
    size_R = np.minimum(rows.size_R, fit_RT.sum(1) // each)
    return _kept(rows, size_R, negative_RT, fit_RT, size_R * each)


SAMPLED: dict[str, Callable[[Positives, Touches, Items, ExamplePlan], Candidates]] = {"raw": raw, "fair": fair}


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Rows that negatives are drawn for: the positives of a basket, or of a slice of one.

    order_P: the positives in the order of their rows; a row has those at first_R:first_R + size_R.
    """

    positives: Positives
    basket_R: np.ndarray
    slice_R: np.ndarray
    first_R: np.ndarray
    size_R: np.ndarray
    order_P: np.ndarray

    @classmethod
    def of(cls, positives: Positives, slice_P: np.ndarray) -> Rows:
        row_P = positives.basket_P * 2 + slice_P
        order_P = np.lexsort((positives.rank_P, row_P))
        row_R, first_R, size_R = np.unique(row_P[order_P], return_index=True, return_counts=True)
        return cls(
            positives=positives,
            basket_R=row_R // 2,
            slice_R=row_R % 2,
            first_R=first_R,
            size_R=size_R,
            order_P=order_P,
        )


def _negatives(rows: Rows, touches: Touches, items: Items, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """What is drawn for each row, for its positives in turn, and which of it is new and not of the basket."""
    positives, try_T = rows.positives, np.arange(TRIES)
    of = positives.of
    positive_RT = rows.order_P[rows.first_R[:, None] + try_T % rows.size_R[:, None]]
    group_RT = items.group_M[positives.item_P[positive_RT]]
    user_R, key_R, now_R, start_R = (
        np.broadcast_to(x[rows.basket_R][:, None], group_RT.shape)
        for x in (of.user_B, of.key_B, of.now_ms_B, of.start_B)
    )
    drawn_RT = uniform(seed, NEGATIVES, key_R, now_R, rows.slice_R[:, None], try_T[None])
    negative_RT = np.zeros(drawn_RT.shape, np.int64)
    own, by_count = rows.slice_R == REPEAT, rows.slice_R == NOVEL
    negative_RT[own] = touches.draw(user_R[own], group_RT[own], start_R[own], drawn_RT[own])
    negative_RT[by_count] = items.popularity.draw(now_R[by_count], group_RT[by_count], drawn_RT[by_count])
    inside_RT = np.isin(rows.basket_R[:, None] * len(items.group_M) + negative_RT, positives.inside)
    return negative_RT, ~inside_RT & ~_again(negative_RT)


def _again(drawn_RT: np.ndarray) -> np.ndarray:
    """Which were drawn before in their row."""
    order_RT = np.argsort(drawn_RT, axis=1, kind="stable")
    sorted_RT = np.take_along_axis(drawn_RT, order_RT, axis=1)
    again_RT = np.zeros(drawn_RT.shape, bool)
    np.put_along_axis(again_RT, order_RT[:, 1:], sorted_RT[:, 1:] == sorted_RT[:, :-1], axis=1)
    return again_RT


def _kept(
    rows: Rows, size_R: np.ndarray, negative_RT: np.ndarray, fit_RT: np.ndarray, count_R: np.ndarray
) -> Candidates:
    """The first size_R positives of each row, and the first count_R of its negatives that fit."""
    place_P = np.arange(len(rows.order_P)) - np.repeat(rows.first_R, rows.size_R)
    kept_P = rows.order_P[place_P < np.repeat(size_R, rows.size_R)]
    kept_RT = fit_RT & (np.cumsum(fit_RT, axis=1) <= count_R[:, None])
    return Candidates(
        basket_C=np.concatenate([rows.positives.basket_P[kept_P], np.repeat(rows.basket_R, kept_RT.sum(1))]),
        item_C=np.concatenate([rows.positives.item_P[kept_P], negative_RT[kept_RT]]),
        label_C=np.repeat([1, 0], [len(kept_P), int(kept_RT.sum())]),
    )
