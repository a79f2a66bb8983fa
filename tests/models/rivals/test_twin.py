import numpy as np
import pytest

from models.rivals import twin
from tests.models.rivals.small_rival import age_buckets, asked, parameters, softmax, vectors
from tests.small_examples import SIZES


@pytest.mark.parametrize("finalists", [3, 100])
def test_twin_is_the_formula_of_its_paper(tmp_path, monkeypatch, finalists):
    """alpha = K_h W^h W^q q / sqrt(d_k) + K_c W^c beta; softmax over the top alphas; [K_h, K_c] W^v; W^o."""
    monkeypatch.setattr(twin, "FINALISTS", finalists)
    ranker, one, seen = asked(tmp_path, "twin")
    p = parameters(ranker)
    inherent = vectors(ranker, one.item_L)
    cross = np.stack([p["action.weight"][one.action_L], p["age.bucket.weight"][age_buckets(one)]], axis=1)
    every = np.concatenate([inherent, cross.reshape(len(cross), -1)], axis=1)
    w_value = np.concatenate([p["value.weight"], p["cross_value.weight"]], axis=1)
    e, d = SIZES.key_width, SIZES.value_width
    assert len(inherent) > 3
    for c, target in enumerate(vectors(ranker, one.candidate_C)):
        heads = []
        for h in range(SIZES.heads):
            w_query, w_key = (p[name][h * e : (h + 1) * e] for name in ("query.weight", "key.weight"))
            pressed = np.stack([cross[:, j] @ p["cross_HJX"][h, j] for j in range(2)], axis=1)
            alpha = (inherent @ w_key.T) @ (w_query @ target) / np.sqrt(e) + pressed @ p["beta_J"]
            best = np.argsort(-alpha)[:finalists]
            heads.append(softmax(alpha[best]) @ (every[best] @ w_value[h * d : (h + 1) * d].T))
        np.testing.assert_allclose(seen[c], p["out.weight"] @ np.concatenate(heads), atol=1e-4)
