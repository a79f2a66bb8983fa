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


GIVEN = torch.arange(500) % 5


def started_with_given() -> Codebook:
    codebook = Codebook(2, 8, 4)
    codebook.start(keys(500), torch.Generator().manual_seed(0), given_N=GIVEN)
    return codebook


def test_given_codes_are_those_of_group_0_and_their_codewords_the_means_of_its_keys():
    codebook = started_with_given()
    code = codebook.encode(keys(500), GIVEN)
    assert torch.equal(code[:, 0], GIVEN)
    assert torch.equal(code[:, 1], codebook.encode(keys(500))[:, 1])
    assert len(code[:, 1].unique()) == 8
    for k in range(8):
        # To no key of the sample the last three are given.
        wanted = keys(500)[k == GIVEN, 0] if k < 5 else keys(500)[:, 0]
        torch.testing.assert_close(codebook.codeword_GKF[0, k], wanted.mean(0))
    quantised, _ = codebook(keys(500), GIVEN)
    torch.testing.assert_close(quantised[:, 0], codebook.codeword_GKF[0, GIVEN])


def test_codewords_of_given_codes_follow_their_keys_and_none_is_revived():
    codebook, generator = started_with_given(), torch.Generator().manual_seed(1)
    rare = codebook.codeword_GKF[0, 4].clone()
    moved, others = keys(500)[GIVEN < 4] + 3, GIVEN[GIVEN < 4]
    # So many that next to nothing is left of the sums of the one that is not met.
    for _ in range(3_000):
        codebook.update(moved, torch.ones(400), generator, others)
    for k in range(4):
        torch.testing.assert_close(codebook.codeword_GKF[0, k], moved[others == k, 0].mean(0), atol=1e-4, rtol=0)
    assert codebook.usage_GK[0, 4] < 1e-10
    torch.testing.assert_close(codebook.codeword_GKF[0, 4], rare)
    # Met at last, it is where its keys are at once.
    codebook.update(keys(500) + 7, torch.ones(500), generator, GIVEN)
    torch.testing.assert_close(codebook.codeword_GKF[0, 4], (keys(500) + 7)[GIVEN == 4, 0].mean(0))
