import numpy as np
import torch

from models.request import collate
from models.rivals.din import WINDOW
from tests.models.rivals.small_rival import age_buckets, asked, parameters, vectors
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


def test_with_time_the_unit_sees_the_age_beside_the_pair(tmp_path):
    """a(e, A) = v . prelu(W [A, e, A e, A - e] + U[age bucket] + b) + c."""
    ranker, one, seen = asked(tmp_path, "din_50_time")
    p = parameters(ranker)
    event = vectors(ranker, one.item_L) + p["action.weight"][one.action_L]
    age = p["age.bucket.weight"][age_buckets(one)]
    for c, target in enumerate(vectors(ranker, one.candidate_C)):
        beside = np.broadcast_to(target, event.shape)
        pair = np.concatenate([beside, event, beside * event, beside - event], axis=1)
        hidden = pair @ p["pair.weight"].T + p["pair.bias"] + age
        hidden = np.where(hidden > 0, hidden, p["unit.0.weight"] * hidden)
        weight = (hidden @ p["unit.1.weight"].T + p["unit.1.bias"])[:, 0] * one.weight_L
        np.testing.assert_allclose(seen[c], weight @ (event @ p["value.weight"].T), atol=1e-4)
