"""Events by column, the baskets and sessions among them, and what each user had touched before.

A basket is a user's events of one time: a shopping basket, a commit. A session is what a user was shown without a
long pause. What came strictly before either is its history.

Shapes: N events, B baskets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from zlib import crc32

import msgspec
import numpy as np

from jobs.popularity import uniform

# Told apart in the keys of the draws.
CHOOSE, POSITIVES, NEGATIVES = (np.array([key]) for key in (1, 2, 3))


class ExamplePlan(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the impressions. They lie in [from_ms, until_ms); a user has at most per_user of them.

    protocol: raw, fair or impressions. within: the item field within whose value negatives are drawn, None for all
    items. positives, negatives: at most so many of a basket; in `fair` each positive has negatives // positives.
    shown, clicked: the actions of what was shown and of what, of that, was clicked; session_ms: the longest pause
    within a session (all three for `impressions`). remembered: the actions that histories are made of, none for all.
    serving_delay_ms: what happened so shortly before an impression is not in its history, because a ranker would not
    know it yet.
    """

    from_ms: int = 0
    until_ms: int = 2**62
    per_user: int = 16
    positives: int = 4
    negatives: int = 16
    period_ms: int = 28 * 86_400_000
    files: int = 8
    seed: int = 0
    protocol: str = "raw"
    within: str | None = None
    shown: tuple[str, ...] = ()
    clicked: tuple[str, ...] = ()
    session_ms: int = 1_800_000
    remembered: tuple[str, ...] = ()
    serving_delay_ms: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Events:
    """Events of U users by column: each user's together, oldest first. user_N: place in user_ids, never falling."""

    user_ids: Sequence[str]
    user_N: np.ndarray
    item_N: np.ndarray
    action_N: np.ndarray
    time_ms_N: np.ndarray
    weight_N: np.ndarray

    def where(self, kept_N: np.ndarray) -> Events:
        """The events that are kept; all users stay."""
        columns = {f.name: getattr(self, f.name)[kept_N] for f in fields(self) if f.name != "user_ids"}
        return Events(user_ids=self.user_ids, **columns)

    @property
    def user_key_N(self) -> np.ndarray:
        """A number of each event's user that does not depend on who else is there."""
        return np.array([crc32(user_id.encode()) for user_id in self.user_ids], np.int64)[self.user_N]


@dataclass(frozen=True, kw_only=True, slots=True)
class Baskets:
    """Whose, when, and the events start_B:end_B, before which the history ends. key_B is the user's, for draws."""

    user_B: np.ndarray
    key_B: np.ndarray
    now_ms_B: np.ndarray
    start_B: np.ndarray
    end_B: np.ndarray

    def __len__(self) -> int:
        return len(self.user_B)

    def where(self, places: np.ndarray | slice) -> Baskets:
        return Baskets(**{f.name: getattr(self, f.name)[places] for f in fields(self)})


def find_baskets(events: Events) -> Baskets:
    """Every user's events of one time."""
    new_N = _new(events, np.arange(len(events.user_N)), pause_ms=0)
    start = np.flatnonzero(new_N)
    return Baskets(
        user_B=events.user_N[start],
        key_B=events.user_key_N[start],
        now_ms_B=events.time_ms_N[start],
        start_B=start,
        end_B=np.r_[start[1:], len(new_N)][: len(start)],
    )


def find_sessions(events: Events, place_S: np.ndarray, pause_ms: int) -> tuple[Baskets, np.ndarray]:
    """Sessions of S events, which are at these places, with no longer pause within one; and the session of each.

    A session starts with all events of its first moment, so that these are not in its history either.
    """
    new_S = _new(events, place_S, pause_ms)
    first = place_S[new_S]
    moments = find_baskets(events)
    return (
        Baskets(
            user_B=events.user_N[first],
            key_B=events.user_key_N[first],
            now_ms_B=events.time_ms_N[first],
            start_B=moments.start_B[np.searchsorted(moments.start_B, first, side="right") - 1],
            end_B=place_S[np.r_[new_S[1:], np.ones(min(1, len(new_S)), bool)]] + 1,
        ),
        np.cumsum(new_S) - 1,
    )


def history_ends(found: Baskets, events: Events, plan: ExamplePlan) -> np.ndarray:
    """The first event that each basket does not see: of its own, or of the time after now - serving_delay_ms."""
    if plan.serving_delay_ms == 0:
        return found.start_B
    times, time_N = np.unique(events.time_ms_N, return_inverse=True)
    # Users and places of times as one number: events are sorted by it.
    key_N = events.user_N * (len(times) + 1) + time_N
    known_B = np.searchsorted(times, found.now_ms_B - plan.serving_delay_ms)
    return np.minimum(found.start_B, np.searchsorted(key_N, found.user_B * (len(times) + 1) + known_B))


def _new(events: Events, place_S: np.ndarray, pause_ms: int) -> np.ndarray:
    """Which of the events at these places begin something: another user's, or after a longer pause than this."""
    new_S = np.ones(len(place_S), bool)
    new_S[1:] = (np.diff(events.user_N[place_S]) != 0) | (np.diff(events.time_ms_N[place_S]) > pause_ms)
    return new_S


def choose(found: Baskets, events: Events, plan: ExamplePlan) -> np.ndarray:
    """Which baskets become impressions: a seeded draw of those within the plan's time that have a history."""
    fit_B = (found.now_ms_B >= plan.from_ms) & (found.now_ms_B < plan.until_ms)
    fit_B &= history_ends(found, events, plan) > np.searchsorted(events.user_N, found.user_B)
    places = np.flatnonzero(fit_B)
    order = uniform(plan.seed, CHOOSE, found.key_B[places], found.now_ms_B[places])
    return places[rank(found.user_B[places], order) < plan.per_user]


@dataclass(frozen=True, kw_only=True, slots=True)
class Touches:
    """When each user first touched each item, sorted twice: by (user, item), and by (user, group, time).

    Shapes: T pairs of user and item. first is the event's place; pool_T holds (user, group, first) as one number.
    """

    pair_T: np.ndarray
    first_T: np.ndarray
    pool_T: np.ndarray
    pool_item_T: np.ndarray
    group_M: np.ndarray
    events: int

    @classmethod
    def of(cls, events: Events, group_M: np.ndarray) -> Touches:
        known = np.flatnonzero(events.item_N > 0)
        pair_N = events.user_N[known].astype(np.int64) * len(group_M) + events.item_N[known]
        pair_T, at = np.unique(pair_N, return_index=True)
        first_T, item_T = known[at], pair_T % len(group_M)
        groups, size = int(group_M.max()) + 1, len(events.user_N) + 1
        pool_T = (pair_T // len(group_M) * groups + group_M[item_T]) * size + first_T
        order = np.argsort(pool_T)
        return cls(
            pair_T=pair_T,
            first_T=first_T,
            pool_T=pool_T[order],
            pool_item_T=item_T[order],
            group_M=group_M,
            events=size,
        )

    def before(self, user: np.ndarray, item: np.ndarray, start: np.ndarray) -> np.ndarray:
        """Whether the user touched the item before the event at this place."""
        pair = user.astype(np.int64) * len(self.group_M) + item
        at = np.minimum(np.searchsorted(self.pair_T, pair), len(self.pair_T) - 1)
        return (self.pair_T[at] == pair) & (self.first_T[at] < start)

    def draw(self, user: np.ndarray, group: np.ndarray, start: np.ndarray, drawn: np.ndarray) -> np.ndarray:
        """One of the items of the group that the user touched before, each as likely; 0 where there are none."""
        groups = int(self.group_M.max()) + 1
        pool = (user.astype(np.int64) * groups + group) * self.events
        first, after = np.searchsorted(self.pool_T, pool), np.searchsorted(self.pool_T, pool + start)
        at = first + (drawn * (after - first)).astype(np.int64)
        return np.where(after > first, self.pool_item_T[np.minimum(at, len(self.pool_item_T) - 1)], 0)


def rank(group: np.ndarray, key: np.ndarray) -> np.ndarray:
    """The place of each element among those of its group, in the order of the key."""
    order = np.lexsort((key, group))
    sorted_group = group[order]
    place = np.arange(len(group)) - np.searchsorted(sorted_group, sorted_group)
    ranks = np.empty(len(group), np.int64)
    ranks[order] = place
    return ranks
