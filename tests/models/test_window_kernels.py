"""The compiled window is the one of torch, whatever the ages, the weights and the items."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from models.attention import CacheBatch
from models.ranker import Ranker
from models.request import History
from models.served import ServedWindow
from models.temporal import AGE_BUCKETS
from tests.models.test_ranker import new_ranker, new_spec

LENGTH, USERS = 7, 4
YEAR_MS = 365 * 24 * 3_600_000


def random_ranker() -> Ranker:
    ranker = new_ranker(newest=LENGTH)
    assert ranker.history.window is not None
    for parameter in ranker.history.window.parameters():
        torch.nn.init.normal_(parameter)
    return ranker


def of_events(newest: History) -> CacheBatch:
    return CacheBatch.of(new_spec(1), [None] * len(newest.item_BL), newest=newest)


def random_events(items: int) -> History:
    """Ages to a year, padding, a user without any, and an item beyond the table."""
    rng = np.random.default_rng(0)
    weight_BL = rng.choice([0.0, 0.5, 1.0], (USERS, LENGTH))
    weight_BL[0] = 0.0
    item_BL = rng.integers(0, items, (USERS, LENGTH))
    item_BL[1, 0] = items
    return History(
        item_BL=torch.from_numpy(item_BL),
        action_BL=torch.from_numpy(rng.integers(0, 2, (USERS, LENGTH))),
        time_ms_BL=torch.from_numpy(np.sort(rng.integers(0, YEAR_MS, (USERS, LENGTH)))),
        weight_BL=torch.from_numpy(weight_BL.astype(np.float32)),
    )


def both(ranker: Ranker, newest: History, now_ms_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(compiled, torch's) of every item."""
    window = ranker.history.window
    assert window is not None
    items = len(ranker.encoder.feature_MF)
    candidate_BC = torch.arange(items).expand(len(now_ms_B), items)
    found = ServedWindow(ranker, window).read(candidate_BC, of_events(newest), now_ms_B)
    event_BLd = ranker.encoder(ranker.encoder.known(newest.item_BL))
    return found, window(ranker.encoder(candidate_BC), event_BLd, newest, now_ms_B).flatten(2)


@torch.inference_mode()
def test_it_reads_as_the_operations_of_torch():
    ranker = random_ranker()
    newest = random_events(len(ranker.encoder.feature_MF))
    found, wanted = both(ranker, newest, newest.time_ms_BL[:, -1] + 1)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    assert not found[0].any()
    assert found[1:].abs().amin(dim=(1, 2)).max() > 0


@torch.inference_mode()
def test_every_age_has_the_bucket_of_torch_at_its_edges_too():
    """Each event alone: before, at and after the moment at which a bucket begins, and an event that is yet to be."""
    ranker = random_ranker()
    edge_K = np.ceil(1000 * (2 ** (np.arange(AGE_BUCKETS + 2) / 2) - 1)).astype(np.int64)
    age_N = np.unique(np.concatenate([edge_K - 1, edge_K, edge_K + 1, [-(10**9)]]))
    weight_NL = torch.zeros(len(age_N), LENGTH)
    weight_NL[:, -1] = 1
    none_NL = torch.zeros(len(age_N), LENGTH, dtype=torch.int64)
    newest = History(item_BL=none_NL + 3, action_BL=none_NL, time_ms_BL=none_NL, weight_BL=weight_NL)
    found, wanted = both(ranker, newest, torch.from_numpy(age_N))
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-4)
    assert len(np.unique(found[:, 5, 0].numpy().round(3))) > AGE_BUCKETS / 2


@torch.inference_mode()
def test_an_action_without_a_vector_is_refused():
    ranker = random_ranker()
    newest = random_events(9)
    newest = replace(newest, action_BL=newest.action_BL + 2)
    with pytest.raises(IndexError, match="action that has no vector"):
        both(ranker, newest, newest.time_ms_BL[:, -1])
