"""The window over the newest events: its formula, whom it attends, and a ranker with and without it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.attention import CacheBatch
from models.request import History, collate, collate_timelines
from models.timelines import timeline_files, timelines_of
from models.window import Window, newest_before
from tests.models.test_ranker import caches_of, impressions, new_ranker, new_spec
from tests.small import HOUR_MS, START_MS
from tests.small_examples import SIZES, write_small_examples

ACTIONS, LENGTH = 3, 6
NOW_MS = START_MS + 30 * HOUR_MS


def new_window() -> Window:
    torch.manual_seed(1)
    window = Window(SIZES, ACTIONS)
    for parameter in window.parameters():
        torch.nn.init.normal_(parameter)
    return window


def some_events(users: int = 2) -> tuple[torch.Tensor, History]:
    """Vectors of items, and what else events have; the second user has two, the third none."""
    rng = np.random.default_rng(0)
    weight = rng.uniform(0.5, 2, (users, LENGTH)).astype(np.float32)
    weight[1, :-2] = 0
    weight[2:] = 0
    newest = History(
        item_BL=torch.zeros(users, LENGTH, dtype=torch.int64),
        action_BL=torch.from_numpy(rng.integers(0, ACTIONS, (users, LENGTH))),
        time_ms_BL=torch.from_numpy(START_MS + rng.integers(0, 30, (users, LENGTH)) * HOUR_MS),
        weight_BL=torch.from_numpy(weight),
    )
    return torch.from_numpy(rng.normal(size=(users, LENGTH, SIZES.width)).astype(np.float32)), newest


def by_hand(window: Window, x_d: np.ndarray, event_Ld: np.ndarray, newest: History, user: int) -> np.ndarray:
    """What one candidate sees, event by event, in float64: H D."""
    of = {name: p.detach().double().numpy() for name, p in window.named_parameters()}
    seen_V = np.zeros(SIZES.heads * SIZES.value_width)
    for i in range(LENGTH):
        e_d = event_Ld[i] + of["action.weight"][newest.action_BL[user, i]]
        age_s = (NOW_MS - int(newest.time_ms_BL[user, i])) / 1000
        hidden_J = of["pair.weight"] @ np.concatenate([x_d, e_d, x_d * e_d, x_d - e_d]) + of["pair.bias"]
        hidden_J += of["age.bucket.weight"][int(2 * np.log2(1 + age_s))]
        hidden_J = np.where(hidden_J > 0, hidden_J, of["unit.0.weight"] * hidden_J)
        unit = of["unit.1.weight"][0] @ hidden_J + of["unit.1.bias"][0]
        seen_V += float(newest.weight_BL[user, i]) * unit * (of["value.weight"] @ e_d)
    return seen_V.reshape(SIZES.heads, -1)


@torch.no_grad()
def test_it_is_its_formula_and_zeros_for_who_has_no_events():
    window, (event_BLd, newest) = new_window(), some_events(3)
    candidate_BCd = torch.randn(3, 4, SIZES.width)
    found = window(candidate_BCd, event_BLd, newest, torch.full((3,), NOW_MS))
    for b in range(3):
        for c in range(4):
            wanted = by_hand(window, candidate_BCd[b, c].double().numpy(), event_BLd[b].double().numpy(), newest, b)
            np.testing.assert_allclose(found[b, c], wanted, rtol=1e-4, atol=1e-5)
    assert found[:2].abs().min() > 0
    assert not found[2].any()


@torch.no_grad()
def test_what_has_no_weight_or_takes_back_is_not_attended():
    window, (event_BLd, newest) = new_window(), some_events()
    for weight in (0.0, -1.0):
        weight_BL = newest.weight_BL.clone()
        weight_BL[:, -1] = weight
        without, other = replace(newest, weight_BL=weight_BL), event_BLd.clone()
        other[:, -1] = 7.0
        now_ms_B, candidate_BCd = torch.full((2,), NOW_MS), torch.randn(2, 4, SIZES.width)
        a, b, whole = (
            window(candidate_BCd, *each, now_ms_B)
            for each in ((event_BLd, without), (other, without), (event_BLd, newest))
        )
        assert torch.equal(a, b)
        assert not torch.equal(a, whole)


def test_its_values_start_as_the_candidates_own():
    ranker = new_ranker(newest=7)
    assert torch.equal(ranker.history.window.value.weight, ranker.candidate.weight)


@pytest.mark.parametrize("length", [1, 7, 100])
def test_an_impression_on_a_timeline_has_the_events_up_to_its_end(tmp_path, length):
    timelines = timelines_of(timeline_files(write_small_examples(tmp_path))[0])
    batch = collate_timelines(timelines)
    place_BL, newest = newest_before(batch, length)
    for b, (first, end) in enumerate(zip(batch.first_B.tolist(), batch.end_B.tolist(), strict=True)):
        seen = slice(max(first, end - length), end)
        real = newest.weight_BL[b] > 0
        assert real.tolist() == [False] * (length - (seen.stop - seen.start)) + [True] * (seen.stop - seen.start)
        assert place_BL[b][real].tolist() == list(range(seen.start, seen.stop))
        for name in ("item", "action", "time_ms", "weight"):
            assert torch.equal(getattr(newest, f"{name}_BL")[b][real], getattr(batch, f"{name}_M")[seen])


@torch.inference_mode()
def test_where_its_values_are_nothing_a_ranker_is_the_one_without_it(tmp_path):
    without, ranker, batch = new_ranker(), new_ranker(newest=7), impressions(tmp_path)[:20]
    assert not any("window" in name for name in without.state_dict())
    left = ranker.load_state_dict(without.state_dict(), strict=False)
    assert left.missing_keys
    assert all(name.startswith("history.window.") for name in left.missing_keys)
    request, caches = collate(batch), caches_of(ranker, batch, 1)
    asked = (request.candidate_BC, request.now_ms_B)
    plain = (without(request)[0], without.from_cache(asked[0], caches, asked[1]))
    opened = (ranker(request)[0], ranker.from_cache(asked[0], caches, asked[1]))
    ranker.history.window.value.weight.zero_()
    closed = (ranker(request)[0], ranker.from_cache(asked[0], caches, asked[1]))
    for a, b, c in zip(plain, closed, opened, strict=True):
        assert torch.equal(a, b)
        assert (a - c).abs().max() > 1e-3


@torch.inference_mode()
def test_a_score_depends_on_the_newest_events_alone_beside_the_cache(tmp_path):
    ranker, batch = new_ranker(newest=7), impressions(tmp_path)[:8]
    request, caches = collate(batch), caches_of(ranker, batch, 1)
    scores = ranker.from_cache(request.candidate_BC, caches, request.now_ms_B)
    for name in ("newest_item_BL", "newest_action_BL", "newest_time_ms_BL", "newest_weight_BL"):
        changed = getattr(caches, name).clone()
        changed[:, -1] = changed[:, -1] + (-30 * HOUR_MS if name == "newest_time_ms_BL" else 1)
        changed[:, -1] %= 2 if name == "newest_action_BL" else 10**15
        moved = ranker.from_cache(request.candidate_BC, replace(caches, **{name: changed}), request.now_ms_B)
        assert (moved - scores).abs().max() > 1e-4, name


@torch.inference_mode()
def test_an_absent_user_sees_zeros():
    ranker = new_ranker(newest=7)
    none = torch.zeros(1, 7, dtype=torch.int64)
    padding = History(item_BL=none, action_BL=none, time_ms_BL=none, weight_BL=none.float())
    nobody = CacheBatch.of(new_spec(1), [None], newest=padding)
    candidate_1C = torch.arange(1, 6)[None]
    x_1Cd = ranker.encoder(candidate_1C)
    wanted = ranker.logits(x_1Cd, torch.zeros(1, 5, SIZES.heads * (SIZES.value_width + 1)))
    assert torch.equal(ranker.from_cache(candidate_1C, nobody, torch.tensor([NOW_MS])), wanted)
