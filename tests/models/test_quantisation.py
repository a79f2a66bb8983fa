"""The diagnostics say of a codebook what another computation of it says."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from models.quantisation import LENGTHS, diagnose
from models.ranker import Ranker, Shape, VqlHistory
from models.request import Impression
from models.rivals import HISTORIES
from models.timelines import drawn_events, impressions_of, timeline_files
from tests.small_examples import CATEGORIES, ITEMS, SIZES, feature_table, write_small_examples

DAY_MS = 86_400_000
SHAPE = Shape(
    sizes=SIZES,
    half_life_ms=[[float(DAY_MS)], [float(DAY_MS)], [None], [None]],
    actions=2,
    field_rows=[ITEMS + 1, CATEGORIES + 1],
)
ITEMS_OF_EVENTS = np.array([1, 2, 3, 4, 4, 4])


def ranker(model: str = "vql") -> Ranker:
    torch.manual_seed(3)
    return Ranker(SHAPE, torch.from_numpy(feature_table()), HISTORIES[model](SHAPE)).eval()


def grouped_keys(made: Ranker, items: np.ndarray) -> torch.Tensor:
    assert isinstance(made.history, VqlHistory)
    return made.history.grouped_keys(made.encoder, torch.from_numpy(items))[0].detach()


def quantised(noise: float) -> Ranker:
    """Codeword i - 1 of every group is the key of item i, moved; the rest is far away."""
    made = ranker()
    codeword_GKF = made.history.codebook.codeword_GKF
    codeword_GKF.fill_(1e3)
    keys = grouped_keys(made, np.arange(1, 5))
    codeword_GKF[:, :4] = (keys + noise * torch.randn(keys.shape)).transpose(0, 1)
    made.history.codebook.started.fill_(True)
    return made


def sample() -> Impression:
    events = len(ITEMS_OF_EVENTS)
    return Impression(
        user_id="",
        now_ms=0,
        candidate_C=np.array([5, 6, 7]),
        label_C=np.zeros(3),
        item_L=ITEMS_OF_EVENTS,
        action_L=np.zeros(events, np.int64),
        time_ms_L=-DAY_MS * np.arange(events),
        weight_L=np.linspace(0.5, 1.5, events).astype(np.float32),
    )


def test_codewords_that_are_the_keys_change_nothing() -> None:
    found = diagnose(quantised(0.0), sample())

    assert [error.max for error in found.key_error] == [0.0] * SIZES.groups
    assert [(each.length, each.mean, each.bound) for each in found.attention] == [(n, 0.0, 0.0) for n in LENGTHS]


def test_use_is_of_events() -> None:
    (usage, *_) = diagnose(quantised(0.0), sample()).usage

    # Three items with one event each, one with three.
    share = np.array([1, 1, 1, 3]) / 6
    assert usage.used == 4
    assert usage.perplexity == pytest.approx(math.exp(-(share * np.log(share)).sum()), rel=1e-3)


def test_key_errors_are_relative_and_of_events() -> None:
    made = quantised(0.3)
    found = diagnose(made, sample()).key_error

    keys = grouped_keys(made, ITEMS_OF_EVENTS).numpy()
    moved = made.history.codebook.codeword_GKF.numpy()[:, ITEMS_OF_EVENTS - 1].transpose(1, 0, 2)
    error_NG = np.linalg.norm(keys - moved, axis=-1) / np.linalg.norm(keys, axis=-1)
    for g in range(SIZES.groups):
        assert found[g].p50 == pytest.approx(np.median(error_NG[:, g]), rel=1e-3)
        assert found[g].max == pytest.approx(error_NG[:, g].max(), rel=1e-3)
        assert found[g].max > 0.01


def test_the_difference_of_attention_is_that_of_two_softmaxes() -> None:
    """Of many events drawn from six, each is as often as the others: the softmax over the six themselves."""
    made, seen = quantised(0.3), sample()
    found = diagnose(made, seen).attention[-1]

    history = made.history
    query = history.queries(made.encoder(torch.from_numpy(seen.candidate_C[None])))[0].detach().numpy()
    exact = grouped_keys(made, ITEMS_OF_EVENTS).reshape(6, SIZES.heads, -1).numpy()
    moved = history.codebook.codeword_GKF.numpy()[:, ITEMS_OF_EVENTS - 1].transpose(1, 0, 2).reshape(exact.shape)
    age_days = np.arange(6)
    kernel = np.stack([seen.weight_L * 0.5**age_days] * 2 + [seen.weight_L] * 2)

    def weights(keys: np.ndarray) -> np.ndarray:
        raw = np.exp(np.einsum("che,lhe->chl", query, keys)) * kernel
        return raw / raw.sum(axis=-1, keepdims=True)

    difference = np.abs(weights(exact) - weights(moved)).sum(axis=-1)
    assert found.mean == pytest.approx(difference.mean(), rel=0.03)
    assert 0.01 < found.mean <= found.p99 <= 2


@pytest.mark.parametrize("noise", [0.01, 0.1, 0.5])
def test_no_difference_is_above_its_bound(noise: float) -> None:
    for each in diagnose(quantised(noise), sample()).attention:
        assert 0 < each.mean <= each.bound <= 2


def test_the_same_model_has_the_same_diagnostics() -> None:
    assert diagnose(quantised(0.1), sample()) == diagnose(quantised(0.1), sample())


def test_a_model_without_a_codebook_is_refused() -> None:
    with pytest.raises(TypeError, match="quantises nothing"):
        diagnose(ranker("mean"), sample())


def test_the_sample_is_of_events_as_impressions_saw_them(tmp_path) -> None:
    files = timeline_files(write_small_examples(tmp_path))
    known = [one for file in files for one in impressions_of(file)]
    seen = {(i, t - one.now_ms) for one in known for i, t in zip(one.item_L, one.time_ms_L, strict=True)}

    drawn = drawn_events(files, 500)

    assert 500 <= len(drawn.item_L) < 500 + len(known)
    assert set(zip(drawn.item_L, drawn.time_ms_L, strict=True)) <= seen
    assert (drawn.time_ms_L < 0).all()
    assert sorted(drawn.candidate_C) == sorted(np.concatenate([one.candidate_C for one in known]))
