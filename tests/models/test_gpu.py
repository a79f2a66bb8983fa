"""A GPU trains and scores as the CPU does, but for rounding. Skipped where torch finds none."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from models import training
from models.request import collate
from models.rivals import HISTORIES
from models.served import ServedRanker
from models.timelines import timeline_files
from models.training import TrainPlan, begin, final_parameters, step, train
from tests.models.test_ranker import COUNTING, caches_of, impressions, new_ranker
from tests.models.test_training import COUNTS, go_on_after, losses, trained_gauc
from tests.small_examples import small_plan

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no GPU")
GPU = torch.device("cuda")


def first_steps(plan: TrainPlan, after: int) -> tuple[list[float], dict[str, torch.Tensor]]:
    """The losses of five steps as if so many had been, and the gradients of the first.

    Adam's first step is as long for a gradient of nothing but rounding as for any other: later ones are not the same.
    """
    run = begin(plan)
    run.step = after
    shares = training._epoch_batches(run, timeline_files(Path(plan.examples)), 0, 1)
    values, gradients = [], {}
    for share in islice(shares, 5):
        values.append(step(run, share)[0])
        if not gradients:
            named = run.ranker.named_parameters()
            gradients = {name: p.grad.to_dense().cpu().clone() for name, p in named if p.grad is not None}
    return values, gradients


# Of sixty steps: VQL's keys are exact in the first and quantised in the fortieth.
@pytest.mark.parametrize(("model", "after"), [("vql", 40), *((model, 1) for model in sorted(HISTORIES))])
def test_the_first_losses_and_gradients_are_those_of_the_cpu(tmp_path, model, after):
    counts = COUNTS if model == "vql" else None
    wanted, wanted_grad = first_steps(small_plan(tmp_path, model, counts=counts), after)
    found, found_grad = first_steps(small_plan(tmp_path, model, counts=counts, device="cuda"), after)
    np.testing.assert_allclose(found, wanted, rtol=1e-3)
    assert found_grad.keys() == wanted_grad.keys()
    for name, grad in wanted_grad.items():
        torch.testing.assert_close(found_grad[name], grad, rtol=0.02, atol=0.02 * float(grad.abs().max()) + 1e-6)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_it_learns_as_much_as_on_the_cpu(tmp_path, bfloat16):
    """Quantised, with counts, to the end."""
    plan = small_plan(tmp_path, epochs=12, counts=COUNTS)
    there = {"device": "cuda", "bfloat16": bfloat16, "work": str(tmp_path / "gpu")}
    on_gpu = small_plan(tmp_path, epochs=12, counts=COUNTS, **there)
    assert abs(trained_gauc(on_gpu) - trained_gauc(plan)) < 0.03
    assert {name: a.dtype for name, a in final_parameters(on_gpu).items()} == {
        name: a.dtype for name, a in final_parameters(plan).items()
    }


def test_a_training_killed_twice_goes_on(tmp_path, monkeypatch):
    plan = small_plan(tmp_path, device="cuda", save_every_steps=7)
    go_on_after(monkeypatch, plan, 9, 30)
    whole = small_plan(tmp_path, device="cuda", work=str(tmp_path / "whole"))
    train(whole)
    assert len(losses(plan)) == len(losses(whole))
    # Sums are added in any order there: the same to rounding, which sixty steps make larger.
    np.testing.assert_allclose(losses(plan)[:30], losses(whole)[:30], rtol=0.02)


@pytest.mark.parametrize("newest", [0, 7])
@pytest.mark.parametrize("counting", [None, COUNTING])
@pytest.mark.parametrize("rates", [1, 2])
@torch.inference_mode()
def test_it_serves_the_scores_of_the_cpu(tmp_path, rates, counting, newest):
    ranker = new_ranker(rates=rates, counting=counting, newest=newest)
    batch = impressions(tmp_path)[:50]
    request, caches = collate(batch), caches_of(ranker, batch, rates)
    wanted = ServedRanker(ranker).from_cache(request.candidate_BC, caches, request.now_ms_B)
    on_gpu = ServedRanker(ranker.to(GPU))
    asked = request.candidate_BC.to(GPU), request.now_ms_B.to(GPU)
    found = on_gpu.from_cache(asked[0], caches.to(GPU), asked[1])
    torch.testing.assert_close(found.cpu(), wanted, atol=1e-5, rtol=1e-5)
    halved = on_gpu.from_cache(asked[0], caches.to(GPU, torch.float16), asked[1])
    torch.testing.assert_close(halved.cpu(), wanted, atol=1e-2, rtol=1e-2)
    assert not torch.equal(halved, found)
