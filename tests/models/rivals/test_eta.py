import pytest
import torch

from models.request import collate
from models.rivals import eta
from tests.models.rivals.attend import attended
from tests.models.test_ranker import impressions, new_ranker


@torch.inference_mode()
def test_eta_is_the_formula_of_its_paper(tmp_path, monkeypatch):
    """Attention over the k events of least Hamming distance between signs of projections; the newest of equal ones."""
    monkeypatch.setattr(eta, "NEAREST", 4)
    ranker, one = new_ranker("eta"), impressions(tmp_path)[0]
    request = collate([one])
    history, encoder = ranker.history, ranker.encoder
    seen, _ = history(encoder(request.candidate_BC), encoder, request)
    plane = history.plane_dm.numpy()
    x_Ld = encoder(request.history.item_BL)[0].numpy()
    event_Ld = x_Ld + history.action(request.history.action_BL)[0].numpy()
    assert len(x_Ld) > 4
    for c, item in enumerate(one.candidate_C):
        target = encoder(torch.tensor(int(item))).numpy()
        distance_L = ((x_Ld @ plane > 0) != (target @ plane > 0)).sum(axis=1)
        nearest = sorted(range(len(x_Ld)), key=lambda n: (distance_L[n], -n))[:4]
        wanted = attended(history.attention, target, event_Ld[nearest], one.weight_L[nearest])
        assert seen[0, c].numpy() == pytest.approx(wanted, abs=1e-5)
