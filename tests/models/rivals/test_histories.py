"""What holds for every way to read a history, and what each of them sees of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from models.model_names import MODELS
from models.ranker import Ranker, loss
from models.request import History, Request, collate
from models.rivals import HISTORIES
from tests.models.test_ranker import impressions, new_ranker

# Whether the order of events with equal times, and whether their times, change what is read.
SEES_ORDER = {"memory"}
SEES_TIME = {"vql", "full", "din_50_time", "twin", "sim"}


def seen(ranker: Ranker, request: Request) -> torch.Tensor:
    return ranker.history(ranker.encoder(request.candidate_BC), ranker.encoder, request)[0]


def reordered(history: History, at_L: torch.Tensor) -> History:
    return History(
        item_BL=history.item_BL[:, at_L],
        action_BL=history.action_BL[:, at_L],
        time_ms_BL=history.time_ms_BL[:, at_L],
        weight_BL=history.weight_BL[:, at_L],
    )


def test_the_names_are_those_of_the_models():
    assert list(MODELS) == list(HISTORIES)


@pytest.mark.parametrize("model", HISTORIES)
@torch.inference_mode()
def test_what_stands_in_padding_is_not_seen(tmp_path, model):
    ranker, request = new_ranker(model), collate(impressions(tmp_path)[:16])
    padding_BL = request.history.weight_BL == 0
    assert padding_BL.any()
    history = replace(
        request.history,
        item_BL=torch.where(padding_BL, 7, request.history.item_BL),
        action_BL=torch.where(padding_BL, 1, request.history.action_BL),
        time_ms_BL=torch.where(padding_BL, request.now_ms_B[:, None] - 1, request.history.time_ms_BL),
    )
    assert torch.equal(seen(ranker, replace(request, history=history)), seen(ranker, request))


@pytest.mark.parametrize("model", HISTORIES)
@torch.inference_mode()
def test_the_order_of_events_matters_only_where_the_formula_says_so(tmp_path, model):
    ranker, request = new_ranker(model), collate(impressions(tmp_path)[:1])
    backwards = reordered(request.history, torch.arange(request.history.item_BL.shape[1] - 1, -1, -1))
    moved = (seen(ranker, replace(request, history=backwards)) - seen(ranker, request)).abs().max()
    assert moved > 1e-3 if model in SEES_ORDER else moved < 1e-5


@pytest.mark.parametrize("model", HISTORIES)
@torch.inference_mode()
def test_the_times_of_events_matter_only_where_the_formula_says_so(tmp_path, model):
    ranker, request = new_ranker(model), collate(impressions(tmp_path)[:8])
    age_BL = request.now_ms_B[:, None] - request.history.time_ms_BL
    older = replace(request.history, time_ms_BL=request.now_ms_B[:, None] - 3 * age_BL)
    moved = (seen(ranker, replace(request, history=older)) - seen(ranker, request)).abs().max()
    assert moved > 1e-3 if model in SEES_TIME else moved == 0


@pytest.mark.parametrize("model", HISTORIES)
@torch.inference_mode()
def test_an_empty_history_gives_finite_numbers(tmp_path, model):
    ranker, request = new_ranker(model), collate(impressions(tmp_path)[:2])
    history = replace(request.history, weight_BL=torch.zeros_like(request.history.weight_BL))
    assert seen(ranker, replace(request, history=history)).isfinite().all()


@pytest.mark.parametrize("model", HISTORIES)
def test_gradients_reach_every_parameter(tmp_path, model):
    ranker, request = new_ranker(model).train(), collate(impressions(tmp_path)[:32])
    # One user is new: what was never attended to must not turn into NaN on the way back.
    request.history.weight_BL[0] = 0
    logit_BC, auxiliary = ranker(request)
    (loss(logit_BC, request.label_BC) + auxiliary).backward()
    still = [
        name
        for name, parameter in ranker.named_parameters()
        if parameter.grad is None or float(parameter.grad.to_dense().abs().max()) == 0
    ]
    assert still == []
    assert all(parameter.grad.to_dense().isfinite().all() for parameter in ranker.parameters())


@pytest.mark.parametrize("model", sorted(set(HISTORIES) - {"no_history"}))
def test_gradients_reach_the_items_of_the_history(tmp_path, model):
    ranker, request = new_ranker(model), collate(impressions(tmp_path)[:1])
    ranker.history(ranker.encoder(request.candidate_BC).detach(), ranker.encoder, request)[0].square().sum().backward()
    moved = ranker.encoder.fields[0].weight.grad.to_dense().abs().amax(dim=1).nonzero().flatten()
    assert set(moved.tolist()) == set(request.history.item_BL.flatten().tolist())
