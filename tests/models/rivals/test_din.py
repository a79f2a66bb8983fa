import torch

from models.request import collate
from models.rivals.din import WINDOW
from tests.models.test_ranker import impressions, new_ranker


@torch.inference_mode()
def test_din_is_the_formula_of_its_paper(tmp_path):
    """v(A) = sum over the newest events e of a(e, A) e, with a(e, A) an unnormalised network of the pair."""
    ranker, one = new_ranker("din_50"), impressions(tmp_path)[0]
    request = collate([one])
    din, encoder = ranker.history, ranker.encoder
    seen, _ = din(encoder(request.candidate_BC), encoder, request)
    for c, candidate in enumerate(one.candidate_C):
        target = encoder(torch.tensor(int(candidate)))
        total = torch.zeros(seen.shape[-1])
        for item, action in zip(one.item_L[-WINDOW:], one.action_L[-WINDOW:], strict=True):
            event = encoder(torch.tensor(int(item))) + din.action.weight[int(action)]
            weight = din.unit(din.pair(torch.cat([target, event, target * event, target - event])))[0]
            total += weight * din.value(event)
        torch.testing.assert_close(seen[0, c], total, atol=1e-5, rtol=1e-5)
