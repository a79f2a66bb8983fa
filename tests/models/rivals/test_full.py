from pathlib import Path

import numpy as np
import torch

from models.request import collate
from models.training import final_parameters, train
from tests.models.rivals.small_rival import asked, parameters, softmax, vectors
from tests.models.test_ranker import LIVES, impressions, new_ranker
from tests.small_examples import SIZES, small_plan


def normed(x: np.ndarray) -> np.ndarray:
    x = x.reshape(len(x), SIZES.heads, SIZES.key_width)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)


def test_full_attention_is_softmax_over_exact_keys_with_the_kernel(tmp_path: Path) -> None:
    """o_h = sum_i w_i kappa_h(now - t_i) exp(q.k_i) v_i / sum_i w_i kappa_h(now - t_i) exp(q.k_i), and beside it
    log(1 + sum_i w_i kappa_h(now - t_i)).
    """
    ranker, one, seen = asked(tmp_path, "full")
    p = {name.removeprefix("attention."): value for name, value in parameters(ranker).items()}
    x = vectors(ranker, one.item_L)
    query = normed(vectors(ranker, one.candidate_C) @ p["query.weight"].T)
    query *= np.exp(p["log_temperature_H"])[:, None] / np.sqrt(SIZES.key_width)
    key = normed(x @ p["key.weight"].T)
    value = (x @ p["value.weight"].T).reshape(len(x), SIZES.heads, -1) + p["action_value_AHD"][one.action_L]
    seen_CHD, told_CH = seen[:, : -SIZES.heads].reshape(4, SIZES.heads, -1), seen[:, -SIZES.heads :]
    for h, (half_life_ms,) in enumerate(LIVES[1]):
        decay = 1.0 if half_life_ms is None else 0.5 ** ((one.now_ms - one.time_ms_L) / half_life_ms)
        kappa = np.log1p(np.exp(p["kernel.raw_HR"][h, 0])) * decay
        wanted = softmax(query[:, h] @ key[:, h].T + np.log(one.weight_L * kappa)) @ value[:, h]
        np.testing.assert_allclose(seen_CHD[:, h], wanted, atol=1e-5)
        np.testing.assert_allclose(told_CH[:, h], np.log1p((one.weight_L * kappa).sum()), rtol=1e-5)


@torch.inference_mode()
def test_full_attention_is_what_vql_quantises(tmp_path: Path) -> None:
    vql, full, request = new_ranker("vql"), new_ranker("full"), collate(impressions(tmp_path)[:8])
    full.history.attention.load_state_dict(vql.history.state_dict())
    vql.history.codebook.started.fill_(False)
    full.history.attention.codebook.started.fill_(False)
    full.load_state_dict({n: t for n, t in vql.state_dict().items() if not n.startswith("history.")}, strict=False)
    exact = full(request)[0]
    assert torch.equal(exact, vql(request)[0])
    vql.history.codebook.started.fill_(True)
    assert (exact - vql(request)[0]).abs().max() > 1e-3


def test_full_attention_has_no_second_branch() -> None:
    names = {name.removeprefix("attention.") for name in parameters(new_ranker("full", newest=7))}
    assert names == set(parameters(new_ranker("vql", newest=0))) < set(parameters(new_ranker("vql", newest=7)))


def test_training_leaves_the_keys_exact(tmp_path: Path) -> None:
    plan = small_plan(tmp_path, "full", epochs=2)
    train(plan)
    assert not final_parameters(plan)["history.attention.codebook.started"]
