import numpy as np
import pytest
import torch

from models.rivals.simhash import WORD, nearest, nearest_words, sides, words


def distances(side_Cm: np.ndarray, side_Lm: np.ndarray) -> np.ndarray:
    return (side_Cm[:, None] != side_Lm[None]).sum(axis=-1)


def plain_nearest(distance_CL: np.ndarray, count: int) -> list[set[int]]:
    """The nearest places of each candidate, of equal ones the newest."""
    order_CL = [sorted(range(len(row)), key=lambda n: (row[n], -n)) for row in distance_CL]
    return [set(order[:count]) for order in order_CL]


def test_sides_are_the_signs_of_projections():
    rng = np.random.default_rng(0)
    x, plane = rng.normal(size=(2, 5, 3)).astype(np.float32), rng.normal(size=(3, 7)).astype(np.float32)
    found = sides(torch.from_numpy(x), torch.from_numpy(plane)).numpy()
    assert (found == (np.einsum("bnd,dm->bnm", x, plane) > 0)).all()


def test_like_vectors_share_bits_in_proportion_to_their_angle():
    plane = torch.randn(2, 20_000, generator=torch.Generator().manual_seed(0))
    angle = 0.7
    x = torch.tensor([[1.0, 0.0], [np.cos(angle), np.sin(angle)]], dtype=torch.float32)
    a, b = sides(x, plane)
    assert float((a == b).float().mean()) == pytest.approx(1 - angle / np.pi, abs=0.01)


@pytest.mark.parametrize(("length", "count"), [(1, 5), (4, 5), (300, 5), (300, 300), (1_000, 50)])
def test_both_searches_find_the_nearest_and_of_equal_ones_the_newest(length, count):
    rng = np.random.default_rng(length + count)
    # Few different hashes, so that equal distances are common.
    known = rng.random((20, WORD)) < 0.5
    side_Cm, side_Lm = known[rng.integers(0, 20, 9)], known[rng.integers(0, 20, length)]
    side_Lm = side_Lm ^ (rng.random(side_Lm.shape) < 0.02)
    wanted = plain_nearest(distances(side_Cm, side_Lm), count)
    weight_BL = torch.ones(1, length)
    plain = nearest(torch.from_numpy(side_Cm)[None], torch.from_numpy(side_Lm)[None], weight_BL, count)[0]
    compiled = nearest_words(words(side_Cm), words(side_Lm), count)
    assert [set(row) for row in plain.tolist()] == wanted
    assert [set(row) for row in compiled.tolist()] == wanted
    assert compiled.shape == plain.shape


def test_events_without_weight_are_found_last():
    side_BLm = torch.zeros(1, 4, WORD, dtype=torch.bool)
    side_BLm[0, 1, :9] = True
    found = nearest(side_BLm[:, :1], side_BLm, torch.tensor([[0.0, 1.0, 1.0, 0.0]]), 3)
    assert set(found[0, 0, :2].tolist()) == {1, 2}
