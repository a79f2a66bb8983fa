"""The serving form scores as its plain twin, and knows how far a logit can be from 0."""

from __future__ import annotations

import math

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
        asked = (request.candidate_BC, caches, request.now_ms_B)
        return ServedRanker(ranker).from_cache(*asked), ranker.from_cache(*asked)


@pytest.mark.parametrize("counting", [None, COUNTING])
@pytest.mark.parametrize("rates", [1, 2])
@pytest.mark.parametrize("temperature", [1.0, 100.0])
def test_it_scores_as_the_plain_form(tmp_path, rates, temperature, counting):
    ranker = new_ranker(rates=rates, counting=counting)
    torch.nn.init.constant_(ranker.history.log_temperature_H, math.log(temperature))
    found, wanted = scored_both_ways(ranker, rates, tmp_path)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)
    assert found.isfinite().all()


def test_queries_of_many_items_are_made_in_parts(tmp_path, monkeypatch):
    monkeypatch.setattr(served, "ITEMS_AT_ONCE", 7)
    found, wanted = scored_both_ways(new_ranker(), 1, tmp_path)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 100.0])
@torch.inference_mode()
def test_means_of_half_precision_are_read_at_any_temperature(tmp_path, temperature):
    ranker, batch = new_ranker(), impressions(tmp_path)[:8]
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


def test_a_rival_cannot_be_served():
    with pytest.raises(TypeError, match="DinHistory cannot be read from a cache"):
        ServedRanker(new_ranker("din_50"))
