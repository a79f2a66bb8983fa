"""A batch of impressions: histories end at the last column, and padding can be told from events."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.counts import Counter, CountPlan
from models.request import PADDING, Impression, Timeline, collate, collate_timelines, counted


def impression(events: int, candidates: int, user_id: str = "u") -> Impression:
    n = np.arange(1, events + 1)
    return Impression(
        user_id=user_id,
        now_ms=1000 + events,
        candidate_C=np.arange(10, 10 + candidates, dtype=np.int32),
        label_C=np.r_[1, np.zeros(candidates - 1)].astype(np.int8),
        item_L=n.astype(np.int32),
        action_L=(n % 2).astype(np.int32),
        time_ms_L=n * 100,
        weight_L=(n / 2).astype(np.float32),
    )


def test_histories_are_padded_on_the_left_with_weight_zero():
    history = collate([impression(3, 2), impression(1, 2)]).history
    assert history.item_BL.tolist() == [[1, 2, 3], [0, 0, 1]]
    assert history.action_BL.tolist() == [[1, 0, 1], [0, 0, 1]]
    assert history.time_ms_BL.tolist() == [[100, 200, 300], [0, 0, 100]]
    assert history.weight_BL.tolist() == [[0.5, 1.0, 1.5], [0.0, 0.0, 0.5]]
    assert history.item_BL.dtype == torch.int64


def test_candidates_are_padded_on_the_right_with_a_label_that_is_neither():
    request = collate([impression(1, 3), impression(1, 1)])
    assert request.candidate_BC.tolist() == [[10, 11, 12], [10, 0, 0]]
    assert request.label_BC.tolist() == [[1, 0, 0], [1, PADDING, PADDING]]
    assert request.now_ms_B.tolist() == [1001, 1001]


@pytest.mark.parametrize(
    ("length", "kept"), [(2, [4, 5]), (5, [1, 2, 3, 4, 5]), (9, [1, 2, 3, 4, 5]), (None, [1, 2, 3, 4, 5])]
)
def test_of_a_long_history_the_newest_events_are_kept(length, kept):
    assert collate([impression(5, 1)], length).history.item_BL.tolist() == [kept]


def test_a_user_without_events_has_padding_alone():
    history = collate([impression(0, 1)]).history
    assert history.weight_BL.tolist() == [[0.0]]
    both = collate([impression(0, 1), impression(2, 1)]).history
    assert both.weight_BL.tolist() == [[0.0, 0.0], [0.5, 1.0]]


def test_the_newest_of_a_history_are_its_last_columns():
    history = collate([impression(4, 1), impression(1, 1)]).history
    assert history.newest(2).item_BL.tolist() == [[3, 4], [0, 1]]
    assert history.newest(2).weight_BL.tolist() == [[1.5, 2.0], [0.0, 0.5]]
    assert history.newest(9).item_BL.tolist() == history.item_BL.tolist()


def timeline(events: int, ends: list[int], user_id: str) -> Timeline:
    whole = impression(events, 1)
    return Timeline(
        user_id=user_id,
        item_L=whole.item_L,
        action_L=whole.action_L,
        time_ms_L=whole.time_ms_L,
        weight_L=whole.weight_L,
        now_ms_I=np.array([1000 + end for end in ends]),
        end_I=np.array(ends),
        candidates=[np.arange(10, 11 + end) for end in ends],
        labels=[np.zeros(1 + end) for end in ends],
    )


def test_timelines_follow_one_another_up_to_the_last_event_that_is_seen():
    batch = collate_timelines([timeline(5, [1, 3], "a"), timeline(4, [2, 0], "b")])
    assert batch.item_M.tolist() == [1, 2, 3, 1, 2]
    assert batch.first_B.tolist() == [0, 0, 3, 3]
    assert batch.end_B.tolist() == [1, 3, 5, 3]
    assert batch.now_ms_B.tolist() == [1001, 1003, 1002, 1000]
    assert batch.candidate_BC[1].tolist() == [10, 11, 12, 13]
    assert batch.label_BC[0].tolist() == [0, 0, PADDING, PADDING]


def test_an_event_that_two_impressions_see_counts_once_in_a_timeline():
    one = timeline(3, [3, 3], "a")
    assert [x.tolist() for x in collate_timelines([one]).items()] == [[1, 2, 3], [1, 1, 1]]
    assert [x.tolist() for x in collate(one.impressions()).items()] == [[1, 2, 3], [2, 2, 2]]


def test_a_part_of_a_timeline_asks_what_the_whole_does():
    one = timeline(5, [1, 4, 2], "a")
    part = one.part(1, 3)
    assert part.item_L.tolist() == [1, 2, 3, 4]
    for a, b in zip(part.impressions(), one.impressions()[1:], strict=True):
        assert a.now_ms == b.now_ms
        assert a.item_L.tolist() == b.item_L.tolist()
        assert a.candidate_C.tolist() == b.candidate_C.tolist()


def test_counts_along_a_timeline_are_those_of_its_impressions_one_by_one():
    """Strictly before each impression: an event at its `end` or later, such as of its own basket, is not counted."""
    counter = Counter(plan=CountPlan(fields=["item_id"], half_life_ms=[None]), cell_MQ=np.arange(20)[:, None])
    one = replace(
        timeline(6, [5, 2, 0], "a"),
        item_L=np.array([7, 8, 7, 7, 9, 7]),
        weight_L=np.ones(6),
        candidates=[np.array([7, 8, 9]), np.array([7, 9]), np.array([7])],
        labels=[np.zeros(3), np.zeros(2), np.zeros(1)],
    )
    found = counted([one], counter)
    assert [count_CX[:, 0].tolist() for count_CX in found] == [[3, 1, 1], [1, 0], [0]]
    alone = counted(one.impressions(), counter)
    assert [each.tolist() for each in found] == [each.tolist() for each in alone]
    assert [each.tolist() for each in counted([one.part(1, 3)], counter)] == [each.tolist() for each in found[1:]]
    batch = collate_timelines([one], found)
    assert batch.count_BCX[..., 0].tolist() == [[3, 1, 1], [1, 0, 0], [0, 0, 0]]
    assert torch.equal(collate(one.impressions(), 1, alone).count_BCX, batch.count_BCX)
    assert counted([one], None) is None
    assert collate_timelines([one]).count_BCX.shape == (3, 3, 0)
