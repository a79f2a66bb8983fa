import torch

from models.request import collate
from tests.models.test_ranker import impressions, new_ranker


@torch.inference_mode()
def test_no_history_sees_zeros_whatever_happened(tmp_path):
    ranker = new_ranker("no_history")
    request = collate(impressions(tmp_path)[:4])
    seen, _ = ranker.history(ranker.encoder(request.candidate_BC), ranker.encoder, request)
    assert seen.shape == (4, 4, 16)
    assert seen.abs().max() == 0
