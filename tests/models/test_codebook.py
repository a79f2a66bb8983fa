import torch

from models.codebook import Codebook


def keys(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 2, 4, generator=torch.Generator().manual_seed(seed))


def started(codewords: int = 8) -> Codebook:
    codebook = Codebook(2, codewords, 4)
    codebook.start(keys(500), torch.Generator().manual_seed(0))
    return codebook


def test_before_the_start_keys_are_exact():
    quantised, commitment = Codebook(2, 8, 4)(keys(10))
    assert torch.equal(quantised, keys(10))
    assert commitment == 0


def test_each_key_takes_its_nearest_codeword():
    codebook = started()
    code = codebook.encode(keys(50, 1))
    distance = (keys(50, 1)[:, :, None, :] - codebook.codeword_GKF[None]).square().sum(-1)
    assert torch.equal(code, distance.argmin(-1))


def test_quantised_values_are_codewords_and_the_gradient_passes_straight_through():
    codebook = started()
    x = keys(20, 2).requires_grad_()
    quantised, _ = codebook(x)
    torch.testing.assert_close(quantised, codebook.decode(codebook.encode(x)))
    quantised.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_more_codewords_mean_less_error():
    errors = [float(started(k)(keys(200, 3))[1]) for k in (2, 8, 64)]
    assert errors == sorted(errors, reverse=True)


def test_updates_move_the_codewords_to_the_keys():
    codebook, shifted = started(), keys(500) + 3
    before = float(codebook(shifted)[1])
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        codebook.update(shifted, torch.ones(500), generator)
    assert float(codebook(shifted)[1]) < before / 3


def test_a_dead_codeword_is_revived_at_a_key():
    codebook = started()
    codebook.codeword_GKF[0, 3] = 100.0
    codebook.usage_GK[0, 3] = 0.0
    codebook.total_GKF[0, 3] = 0.0
    codebook.update(keys(500), torch.ones(500), torch.Generator().manual_seed(1))
    assert codebook.codeword_GKF[0, 3].abs().max() < 10


def test_fewer_distinct_keys_than_codewords_is_no_error():
    codebook = Codebook(2, 16, 4)
    codebook.start(keys(3).repeat(5, 1, 1), torch.Generator().manual_seed(0))
    assert torch.isfinite(codebook.codeword_GKF).all()
    assert float(codebook(keys(3))[1]) < 1e-10
