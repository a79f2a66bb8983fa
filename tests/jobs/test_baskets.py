"""Baskets and sessions, what comes before them, and what a user had touched until then, against plain loops."""

from __future__ import annotations

import numpy as np

from jobs.baskets import Events, ExamplePlan, Touches, choose, find_baskets, find_sessions, rank
from jobs.popularity import uniform

GROUPS, ITEMS = 3, 12


def random_events(seed: int = 0, users: int = 6, count: int = 300) -> Events:
    """Events on few moments, so that baskets have several; item 0 is the unknown one."""
    rng = np.random.default_rng(seed)
    user, time = np.sort(rng.integers(0, users, count)), rng.integers(0, 40, count) * 10
    order = np.lexsort((time, user))
    return Events(
        user_ids=[f"u{n}" for n in range(users)],
        user_N=user[order],
        item_N=rng.integers(0, ITEMS, count).astype(np.int32),
        action_N=rng.integers(0, 3, count).astype(np.int32),
        time_ms_N=time[order].astype(np.int64),
        weight_N=np.ones(count, np.float32),
    )


def test_a_basket_is_a_users_events_of_one_time() -> None:
    events = random_events()
    found = find_baskets(events)
    facts = list(zip(events.user_N.tolist(), events.time_ms_N.tolist(), strict=True))
    baskets = [facts[start:end] for start, end in zip(found.start_B, found.end_B, strict=True)]
    assert [fact for basket in baskets for fact in basket] == facts
    assert all(len(set(basket)) == 1 for basket in baskets)
    assert len(baskets) == len(set(facts))
    assert list(zip(found.user_B.tolist(), found.now_ms_B.tolist(), strict=True)) == sorted(set(facts))


def test_a_session_ends_with_a_longer_pause_and_starts_with_its_whole_first_moment() -> None:
    events = Events(
        user_ids=["a", "b"],
        user_N=np.array([0, 0, 0, 0, 0, 0, 1]),
        item_N=np.arange(1, 8),
        action_N=np.zeros(7, np.int64),
        time_ms_N=np.array([10, 20, 20, 25, 60, 70, 71]),
        weight_N=np.ones(7),
    )
    # The first event of the moment 20 was not shown, and belongs to the session's moment nevertheless.
    sessions, session_S = find_sessions(events, np.array([2, 3, 5, 6]), pause_ms=10)
    assert session_S.tolist() == [0, 0, 1, 2]
    assert sessions.user_B.tolist() == [0, 0, 1]
    assert sessions.start_B.tolist() == [1, 5, 6]
    assert sessions.end_B.tolist() == [4, 6, 7]
    assert sessions.now_ms_B.tolist() == [20, 70, 71]
    nothing, none = find_sessions(events, np.zeros(0, np.int64), pause_ms=10)
    assert (len(nothing), len(none)) == (0, 0)


def test_baskets_are_chosen_within_the_time_with_a_history_and_at_most_so_many_of_a_user() -> None:
    events = random_events()
    found = find_baskets(events)
    every = found.where(choose(found, events, ExamplePlan(from_ms=100, until_ms=200, per_user=100)))
    assert set(every.now_ms_B.tolist()) == set(range(100, 200, 10))
    assert all(events.user_N[start - 1] == user for start, user in zip(every.start_B, every.user_B, strict=True))
    assert len(choose(found, events, ExamplePlan(per_user=1000))) == len(found) - len(events.user_ids)
    some = found.where(choose(found, events, ExamplePlan(from_ms=100, until_ms=200, per_user=2)))
    assert np.bincount(some.user_B).tolist() == [2] * 6
    assert set(some.start_B.tolist()) < set(every.start_B.tolist())
    other = found.where(choose(found, events, ExamplePlan(from_ms=100, until_ms=200, per_user=2, seed=1)))
    assert other.start_B.tolist() != some.start_B.tolist()


def test_touches_know_what_was_before_and_draw_all_of_it_alike() -> None:
    events, group_M = random_events(), np.arange(ITEMS) % GROUPS
    touches = Touches.of(events, group_M)
    numbers = uniform(0, np.arange(3000))
    for place in (1, 40, 150, 299):
        user = int(events.user_N[place])
        first = int(np.searchsorted(events.user_N, user))
        before = set(events.item_N[first:place].tolist()) - {0}
        item_M = np.arange(1, ITEMS)
        found = touches.before(np.full(ITEMS - 1, user), item_M, np.full(ITEMS - 1, place))
        assert set(item_M[found].tolist()) == before
        for group in range(GROUPS):
            wanted = [item for item in before if item % GROUPS == group]
            drawn = touches.draw(np.full(3000, user), np.full(3000, group), np.full(3000, place), numbers)
            share = np.bincount(drawn, minlength=ITEMS) / 3000
            assert set(np.flatnonzero(share).tolist()) == (set(wanted) or {0})
            assert np.abs(share[wanted] - 1 / max(1, len(wanted))).max(initial=0) < 0.05


def test_a_rank_is_the_place_within_the_group() -> None:
    assert rank(np.array([5, 2, 5, 2, 5]), np.array([0.3, 0.2, 0.1, 0.9, 0.2])).tolist() == [2, 0, 0, 1, 1]
    assert rank(np.zeros(0, np.int64), np.zeros(0)).tolist() == []
