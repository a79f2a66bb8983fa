import numpy as np

from tests.models.rivals.small_rival import asked, parameters, vectors


def test_mean_pooling_is_the_weighted_mean_of_all_events(tmp_path):
    ranker, one, seen = asked(tmp_path, "mean")
    p = parameters(ranker)
    event = vectors(ranker, one.item_L) + p["action.weight"][one.action_L]
    weight = one.weight_L.astype(np.float64)
    wanted = (weight[:, None] * (event @ p["value.weight"].T)).sum(axis=0) / weight.sum()
    assert seen.shape == (4, 16)
    for c in range(4):
        np.testing.assert_allclose(seen[c], wanted, atol=1e-5)
