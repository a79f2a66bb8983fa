import numpy as np
import pytest
import torch

from models.request import collate
from models.rivals.sdim import BUCKETS, ROUND_BITS, ROUNDS
from tests.models.test_ranker import impressions, new_ranker


def unit(x: np.ndarray) -> np.ndarray:
    return x / max(np.linalg.norm(x), 1e-12)


@torch.inference_mode()
def test_sdim_is_the_formula_of_its_paper(tmp_path):
    """The mean over rounds of the normalised sum of the events whose signature is the candidate's."""
    ranker = new_ranker("sdim")
    history, encoder, empty = ranker.history, ranker.encoder, 0
    plane, value = history.plane_dm.numpy(), history.value.weight.numpy()
    for one in impressions(tmp_path)[:3]:
        request = collate([one])
        seen, _ = history(encoder(request.candidate_BC), encoder, request)
        x_Ld = encoder(request.history.item_BL)[0].numpy()
        event_Ld = (x_Ld + history.action(request.history.action_BL)[0].numpy()) * one.weight_L[:, None]
        for c, item in enumerate(one.candidate_C):
            target, total = encoder(torch.tensor(int(item))).numpy(), 0.0
            for r in range(ROUNDS):
                columns = plane[:, r * ROUND_BITS : (r + 1) * ROUND_BITS]
                same = ((x_Ld @ columns > 0) == (target @ columns > 0)).all(axis=1)
                empty += not same.any()
                total += unit(event_Ld[same].sum(axis=0)) / ROUNDS
            assert seen[0, c].numpy() == pytest.approx(value @ total, abs=1e-5)
    assert empty > 0


@torch.inference_mode()
def test_a_history_is_buckets_of_length_one_whatever_its_length(tmp_path):
    ranker = new_ranker("sdim")
    request = collate(impressions(tmp_path)[:5])
    history = request.history
    bucket_BSd = ranker.history.buckets(ranker.encoder(history.item_BL), history.action_BL, history.weight_BL)
    assert bucket_BSd.shape == (5, BUCKETS, 8)
    length_BS = bucket_BSd.norm(dim=-1)
    assert ((length_BS - 1).abs().lt(1e-5) | (length_BS == 0)).all()
    assert (length_BS > 0).sum(dim=1).min() >= ROUNDS
