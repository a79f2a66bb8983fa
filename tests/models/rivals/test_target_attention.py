import numpy as np
import pytest
import torch

from models.rivals.target_attention import TargetAttention, take
from tests.models.rivals.attend import attended
from tests.small_examples import SIZES


def test_it_is_attention_over_the_events_at_its_places():
    rng, attention = np.random.default_rng(0), TargetAttention(SIZES)
    torch.nn.init.normal_(attention.query.weight)
    candidate, event = rng.normal(size=(2, 3, SIZES.width)), rng.normal(size=(2, 7, SIZES.width))
    at, weight = rng.integers(0, 7, (2, 3, 4)), rng.uniform(0.5, 2.0, (2, 3, 4))
    with torch.inference_mode():
        found = attention(
            *(torch.from_numpy(a).float() for a in (candidate, event)),
            torch.from_numpy(at),
            torch.from_numpy(weight).float(),
        )
    for b in range(2):
        for c in range(3):
            wanted = attended(attention, candidate[b, c], event[b, at[b, c]], weight[b, c])
            assert found[b, c].numpy() == pytest.approx(wanted, abs=1e-5)


def test_what_has_no_weight_is_not_seen_and_nothing_is_zeros():
    attention = TargetAttention(SIZES)
    candidate, event = torch.randn(1, 2, SIZES.width), torch.randn(1, 3, SIZES.width)
    at = torch.tensor([[[0, 1], [2, 2]]])
    with torch.inference_mode():
        found = attention(candidate, event, at, torch.tensor([[[1.0, 0.0], [0.0, -1.0]]]))
        alone = attention.value(event[0, 0])
    torch.testing.assert_close(found[0, 0], alone)
    assert found[0, 1].abs().max() == 0


def test_gradients_are_finite_where_there_is_nothing_to_see():
    attention = TargetAttention(SIZES)
    candidate, event = torch.randn(1, 1, SIZES.width), torch.randn(1, 2, SIZES.width, requires_grad=True)
    attention(candidate, event, torch.tensor([[[0, 1]]]), torch.zeros(1, 1, 2)).sum().backward()
    assert event.grad is not None
    assert event.grad.isfinite().all()


def test_take_takes_each_users_own_rows():
    event = torch.arange(12.0).view(2, 3, 2)
    assert take(event, torch.tensor([[[2]], [[0]]]))[..., 0].tolist() == [[[4.0]], [[6.0]]]
