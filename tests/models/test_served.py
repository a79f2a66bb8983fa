"""The serving form scores as its plain twin, and knows how far a logit can be from 0."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from models import served
from models.attention import REACH_MAX
from models.ranker import Ranker
from models.request import collate
from models.served import ServedRanker
from tests.models.test_ranker import COUNTING, caches_of, impressions, new_ranker


def scored_both_ways(ranker: Ranker, rates: int, folder) -> tuple[torch.Tensor, torch.Tensor]:
    """(served, plain) for fifty users, the first of them without history."""
    batch = impressions(folder)[:50]
    request = collate(batch)
    with torch.inference_mode():
        caches = caches_of(ranker, batch, rates)
        caches.mass_BHKR[0] = 0
        caches.newest_weight_BL[0] = 0
        asked = (request.candidate_BC, caches, request.now_ms_B)
        return ServedRanker(ranker).from_cache(*asked), ranker.from_cache(*asked)


@pytest.mark.parametrize("newest", [0, 7])
@pytest.mark.parametrize("counting", [None, COUNTING])
@pytest.mark.parametrize("rates", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_it_scores_as_the_plain_form(tmp_path, rates, temperature, counting, newest):
    ranker = new_ranker(rates=rates, counting=counting, newest=newest)
    torch.nn.init.constant_(ranker.history.log_temperature_H, math.log(temperature))
    found, wanted = scored_both_ways(ranker, rates, tmp_path)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_queries_of_many_items_are_made_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(served, "ITEMS_AT_ONCE", 7)
    found, wanted = scored_both_ways(new_ranker(newest=7), 1, tmp_path)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("newest", [0, 7])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
@torch.inference_mode()
def test_means_of_half_precision_are_read_at_any_temperature(tmp_path, temperature, newest):
    ranker, batch = new_ranker(newest=newest), impressions(tmp_path)[:8]
    torch.nn.init.constant_(ranker.history.log_temperature_H, math.log(temperature))
    request, caches = collate(batch), caches_of(ranker, batch, 1)
    found, wanted = (
        ServedRanker(ranker).from_cache(request.candidate_BC, caches.to(torch.device("cpu"), means), request.now_ms_B)
        for means in (torch.float16, torch.float32)
    )
    torch.testing.assert_close(found, wanted, atol=1e-2, rtol=1e-2)
    assert not torch.equal(found, wanted)


@torch.inference_mode()
def test_no_logit_is_beyond_the_reach(tmp_path):
    ranker = new_ranker()
    torch.nn.init.normal_(ranker.history.log_temperature_H)
    item_M = torch.arange(len(ranker.encoder.feature_MF))
    query_MHE = ranker.history.queries(ranker.encoder(item_M[None]))[0]
    largest = torch.einsum("mhe,hke->mhk", query_MHE, ranker.history.codewords()).abs().max()
    reach = ServedRanker(ranker).reach
    assert largest <= reach < REACH_MAX
    assert reach < 2 * query_MHE.norm(dim=-1).max() * ranker.history.codewords().norm(dim=-1).max()


@torch.inference_mode()
def test_a_newest_event_whose_item_was_encoded_after_the_ranker_was_loaded_is_of_the_unknown_item(tmp_path):
    ranker, batch = new_ranker(newest=7), impressions(tmp_path)[:8]
    request, caches = collate(batch), caches_of(ranker, batch, 1)
    for at_1L, item in ((slice(-1, None), 0), (slice(-2, -1), 3)):
        beyond, named = caches.newest_item_BL.clone(), caches.newest_item_BL.clone()
        beyond[:, at_1L], named[:, at_1L] = len(ranker.encoder.feature_MF), item
        asked = [replace(caches, newest_item_BL=item_BL) for item_BL in (beyond, named)]
        for form in (ranker, ServedRanker(ranker)):
            a, b = (form.from_cache(request.candidate_BC, each, request.now_ms_B) for each in asked)
            assert torch.equal(a, b) == (item == 0)


@torch.inference_mode()
def test_caches_for_a_window_of_another_size_are_refused(tmp_path):
    batch = impressions(tmp_path)[:2]
    request, caches = collate(batch), caches_of(new_ranker(newest=4), batch, 1)
    ranker = new_ranker(newest=7)
    for form in (ranker, ServedRanker(ranker)):
        with pytest.raises(ValueError, match="newest 4 events for a window over 7"):
            form.from_cache(request.candidate_BC, caches, request.now_ms_B)


def test_a_rival_cannot_be_served():
    with pytest.raises(TypeError, match="DinHistory cannot be read from a cache"):
        ServedRanker(new_ranker("din_50"))
