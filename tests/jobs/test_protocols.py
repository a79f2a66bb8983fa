"""The protocols: nothing of a basket is in its history, and in `fair` it is worth nothing to have been seen before."""

from __future__ import annotations

from collections import Counter

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score

from jobs.baskets import Events, ExamplePlan
from jobs.popularity import count_popularity
from jobs.protocols import draw, remember, seen_before, slices, to_impressions
from jobs.sampling import Items
from models.errors import InputError
from models.request import PADDING, Impression, collate

ITEMS, REPOSITORIES, PERIOD_MS = 90, 3, 10_000
GROUP = np.arange(ITEMS + 1) % REPOSITORIES
PLAN = ExamplePlan(per_user=100, positives=4, negatives=12, period_ms=PERIOD_MS)


def commits(seed: int = 0, users: int = 8, most: int = 6) -> Events:
    """Each user commits to two repositories, and comes back to a few files."""
    rng = np.random.default_rng(seed)
    rows = []
    for user in range(users):
        # Item 0 is the unknown one, and comes often.
        favourites = np.r_[0, rng.integers(1, ITEMS + 1, 12)]
        for commit in range(int(rng.integers(8, 40))):
            repository = int(rng.integers(2)) + user % 2
            pool = favourites if rng.random() < 0.6 else np.arange(ITEMS + 1)
            pool = pool[GROUP[pool] == repository]
            for item in rng.choice(pool, int(rng.integers(1, most))) if len(pool) else []:
                rows.append((user, 1000 * commit + user, int(item), int(rng.integers(3))))
    user, time, item, action = np.array(rows).T
    return Events(
        user_ids=[f"u{n}" for n in range(users)],
        user_N=user,
        item_N=item.astype(np.int32),
        action_N=action.astype(np.int32),
        time_ms_N=time,
        weight_N=np.linspace(0.5, 1, len(user), dtype=np.float32),
    )


def items_of(events: Events) -> Items:
    found = Counter(zip((events.time_ms_N // PERIOD_MS).tolist(), events.item_N.tolist(), strict=True))
    period, item = np.array(list(found)).T
    return Items(
        popularity=count_popularity(period, item, np.array(list(found.values())), GROUP, PERIOD_MS), group_M=GROUP
    )


def made(events: Events, **changes) -> list[Impression]:
    plan = msgspec.structs.replace(PLAN, **changes)
    items = items_of(events)
    one_group = Items(
        popularity=count_popularity(
            events.time_ms_N // PERIOD_MS, events.item_N, np.ones(len(events.item_N)), GROUP * 0, PERIOD_MS
        ),
        group_M=GROUP * 0,
    )
    actions = ["view", "click", "other"]
    return to_impressions(
        *remember(events, draw(events, items if plan.within else one_group, plan, actions), plan, actions)
    )


def columns(impressions: list[Impression]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Label, seen before, user of every candidate."""
    return (
        np.concatenate([i.label_C for i in impressions]),
        np.concatenate([seen_before(i) for i in impressions]),
        np.concatenate([[i.user_id] * len(i.label_C) for i in impressions]),
    )


def auc(label_C: np.ndarray, seen_C: np.ndarray) -> float:
    """The AUC of a score of two values, from whole numbers: half is exactly half."""
    seen, count = (np.bincount(label_C, weights=w, minlength=2).astype(int) for w in (seen_C, np.ones(len(seen_C))))
    won, tied = seen[1] * (count[0] - seen[0]), seen[1] * seen[0] + (count[1] - seen[1]) * (count[0] - seen[0])
    return (2 * won + tied) / (2 * count[0] * count[1])


@given(seed=st.integers(0, 10_000), within=st.sampled_from([None, "repo"]), each=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_seen_before_alone_is_worth_nothing_in_the_fair_protocol(seed: int, within: str | None, each: int) -> None:
    found = made(commits(seed), protocol="fair", within=within, negatives=4 * each, seed=seed)
    if not found:
        return
    label_C, seen_C, user_C = columns(found)
    assert label_C.mean() == pytest.approx(1 / (1 + each))
    assert auc(label_C, seen_C) == 0.5
    for user in np.unique(user_C):
        assert auc(label_C[user_C == user], seen_C[user_C == user]) == 0.5
    for impression in found:
        assert auc(impression.label_C, seen_before(impression)) == 0.5


def test_seen_before_is_worth_much_in_the_raw_protocol() -> None:
    """So the property above can fail, and the fair protocol has both repeats and novel items to be fair to."""
    label_C, seen_C, _ = columns(made(commits(), protocol="raw"))
    assert auc(label_C, seen_C) > 0.55
    assert auc(label_C, seen_C) == pytest.approx(roc_auc_score(label_C, seen_C))
    label_C, seen_C, _ = columns(made(commits(), protocol="fair"))
    assert 0.1 < seen_C[label_C == 1].mean() < 0.9


@pytest.mark.parametrize("protocol", ["raw", "fair"])
@pytest.mark.parametrize("within", [None, "repo"])
def test_candidates_are_of_the_basket_or_not_and_the_history_is_strictly_before(protocol: str, within) -> None:
    events = commits()
    found = made(events, protocol=protocol, within=within)
    assert len(found) > 50
    for impression in found:
        user = events.user_N == int(impression.user_id[1:])
        basket = set(events.item_N[user & (events.time_ms_N == impression.now_ms)].tolist())
        before = user & (events.time_ms_N < impression.now_ms)
        for name in ("item", "action", "time_ms", "weight"):
            assert np.array_equal(getattr(impression, f"{name}_L"), getattr(events, f"{name}_N")[before])
        assert len(impression.item_L) > 0
        positive, negative = (impression.candidate_C[impression.label_C == label].tolist() for label in (1, 0))
        assert set(positive) <= basket - {0}
        assert not set(negative) & (basket | {0})
        assert len({*positive, *negative}) == len(positive) + len(negative)
        assert 1 <= len(positive) <= PLAN.positives
        assert 1 <= len(negative) <= PLAN.negatives
        if within:
            assert set(GROUP[negative]) <= set(GROUP[positive])


def test_without_groups_negatives_come_from_everywhere() -> None:
    """So the test of groups above can fail."""
    found = made(commits(), protocol="raw")
    assert any(set(GROUP[i.candidate_C[i.label_C == 0]]) - set(GROUP[i.candidate_C[i.label_C == 1]]) for i in found)


@pytest.mark.parametrize("protocol", ["raw", "fair"])
def test_a_seed_gives_the_same_impressions_whoever_else_is_there(protocol: str) -> None:
    events = commits()
    alone_N = events.user_N == 3
    alone = Events(
        user_ids=["u3"],
        user_N=np.zeros(alone_N.sum(), np.int64),
        **{n: getattr(events, n)[alone_N] for n in ("item_N", "action_N", "time_ms_N", "weight_N")},
    )
    plan, items = msgspec.structs.replace(PLAN, protocol=protocol), items_of(events)
    together = [i for i in to_impressions(events, draw(events, items, plan, [])) if i.user_id == "u3"]
    assert len(together) > 3
    for one, other in zip(together, to_impressions(alone, draw(alone, items, plan, [])), strict=True):
        assert one.now_ms == other.now_ms
        assert np.array_equal(one.candidate_C, other.candidate_C)
    assert candidates(made(events, protocol=protocol)) == candidates(made(events, protocol=protocol))
    assert candidates(made(events, protocol=protocol)) != candidates(made(events, protocol=protocol, seed=1))


@pytest.mark.parametrize("protocol", ["raw", "fair"])
def test_two_users_who_did_the_same_are_drawn_for_apart(protocol: str) -> None:
    events = commits(users=1)
    count = len(events.item_N)
    twins = Events(
        user_ids=["u0", "twin"],
        user_N=np.repeat([0, 1], count),
        **{n: np.tile(getattr(events, n), 2) for n in ("item_N", "action_N", "time_ms_N", "weight_N")},
    )
    negatives: dict[str, dict[int, list[int]]] = {"u0": {}, "twin": {}}
    plan = msgspec.structs.replace(PLAN, protocol=protocol)
    for impression in to_impressions(twins, draw(twins, items_of(twins), plan, [])):
        negatives[impression.user_id][impression.now_ms] = impression.candidate_C[impression.label_C == 0].tolist()
    both = negatives["u0"].keys() & negatives["twin"].keys()
    same = [negatives["u0"][now_ms] == negatives["twin"][now_ms] for now_ms in both]
    assert len(same) > 5
    assert sum(same) < len(same) / 2


def candidates(impressions: list[Impression]) -> list[list[int]]:
    return [i.candidate_C.tolist() for i in impressions]


def test_many_baskets_at_once_are_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = candidates(made(commits(), protocol="fair"))
    monkeypatch.setattr("jobs.protocols.BASKETS_AT_ONCE", 7)
    assert candidates(made(commits(), protocol="fair")) == whole


def test_impressions_are_what_was_shown_in_a_session_and_which_of_it_was_clicked() -> None:
    events = Events(
        user_ids=["a"],
        user_N=np.zeros(9, np.int64),
        item_N=np.array([5, 1, 2, 2, 3, 0, 7, 4, 6]),
        # other: what was there before anything was shown; view: shown; click: clicked.
        action_N=np.array([2, 0, 0, 1, 0, 0, 2, 1, 0]),
        time_ms_N=np.array([10, 100, 110, 120, 130, 131, 135, 900, 910]),
        weight_N=np.ones(9, np.float32),
    )
    first, second = made(events, protocol="impressions", shown=("view",), clicked=("click",), session_ms=50)
    assert (first.now_ms, first.item_L.tolist()) == (100, [5])
    assert dict(zip(first.candidate_C.tolist(), first.label_C.tolist(), strict=True)) == {1: 0, 2: 1, 3: 0}
    assert (second.now_ms, second.item_L.tolist()) == (900, [5, 1, 2, 2, 3, 0, 7])
    assert dict(zip(second.candidate_C.tolist(), second.label_C.tolist(), strict=True)) == {4: 1, 6: 0}
    (whole,) = made(events, protocol="impressions", shown=("view",), clicked=("click",), session_ms=10_000)
    assert whole.item_L.tolist() == [5]
    assert sorted(whole.candidate_C.tolist()) == [1, 2, 3, 4, 6]


def test_impressions_make_the_batches_that_rankers_are_trained_and_evaluated_with() -> None:
    found = made(commits(), protocol="fair", within="repo")[:32]
    request = collate(found, length=5)
    assert request.history.item_BL.shape == (32, 5)
    for n, impression in enumerate(found):
        count = len(impression.candidate_C)
        assert request.candidate_BC[n, :count].tolist() == impression.candidate_C.tolist()
        assert request.label_BC[n, :count].tolist() == impression.label_C.tolist()
        assert request.label_BC[n, count:].tolist() == [PADDING] * (request.label_BC.shape[1] - count)


def test_slices_have_the_negatives_that_were_drawn_for_them() -> None:
    seen, label = np.array([True, False, True, False]), np.array([1, 1, 0, 0])
    assert slices("fair", seen, label)["repeat"].tolist() == [True, False, True, False]
    assert slices("fair", seen, label)["novel"].tolist() == [False, True, False, True]
    assert slices("raw", seen, label)["repeat"].tolist() == [True, False, True, True]
    assert slices("raw", seen, label)["novel"].tolist() == [False, True, True, True]
    assert slices("impressions", seen, label)["repeat"].tolist() == [True, False, True, False]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"protocol": "unfair"}, "'unfair' is none of raw, fair, impressions"),
        ({"protocol": "impressions"}, "needs the actions that are clicks"),
        ({"protocol": "fair", "negatives": 3}, "a negative for each positive: 3 for 4"),
    ],
)
def test_a_plan_that_makes_no_sense_is_refused(changes: dict, words: str) -> None:
    with pytest.raises(InputError, match=words):
        made(commits(), **changes)


@pytest.mark.parametrize("protocol", ["raw", "fair", "impressions"])
@pytest.mark.parametrize("delay_ms", [1, 1000, 2500])
def test_what_a_ranker_would_not_know_yet_is_in_no_history(protocol, delay_ms):
    events = commits()
    asked = {"protocol": protocol, "shown": ("view",), "clicked": ("click",), "session_ms": 500}
    late = made(events, serving_delay_ms=delay_ms, **asked)
    at_once = {(i.user_id, i.now_ms): i for i in made(events, **asked)}
    assert late
    for impression in late:
        whole = at_once[impression.user_id, impression.now_ms]
        known = whole.time_ms_L < impression.now_ms - delay_ms
        assert impression.time_ms_L.tolist() == whole.time_ms_L[known].tolist()
        assert impression.item_L.tolist() == whole.item_L[known].tolist()
        assert len(impression.item_L) > 0
    assert any(len(i.item_L) < len(at_once[i.user_id, i.now_ms].item_L) for i in late) == (delay_ms > 1)


def test_histories_are_of_the_actions_that_are_remembered():
    events = commits()
    asked = {"protocol": "impressions", "shown": ("view",), "clicked": ("click",), "session_ms": 500}
    some = {(i.user_id, i.now_ms): i for i in made(events, remembered=("other", "click"), **asked)}
    every = {(i.user_id, i.now_ms): i for i in made(events, **asked)}
    assert some
    for at, whole in every.items():
        kept = whole.action_L != 0
        assert (at in some) == kept.any()
        if kept.any():
            assert some[at].time_ms_L.tolist() == whole.time_ms_L[kept].tolist()
            assert some[at].item_L.tolist() == whole.item_L[kept].tolist()
            assert candidates([some[at]]) == candidates([whole])
            assert some[at].label_C.tolist() == whole.label_C.tolist()
    assert any((i.action_L == 0).any() for i in every.values())
    assert len(some) < len(every)


def test_a_negative_delay_is_refused():
    with pytest.raises(InputError, match="delay of -5 ms would show what has not happened yet"):
        made(commits(), serving_delay_ms=-5)
