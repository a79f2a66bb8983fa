"""Tags and vectors in the item encoder: against the plain formulas, and nothing from what is absent."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from models.context_layers import DEVIATIONS_MAX, ItemVectors, TagMean
from models.item_context import Tags

NAN = float("nan")


def tag_mean() -> TagMean:
    torch.manual_seed(0)
    return TagMean(Tags(known=6, most=4), 8)


def test_tags_are_the_mean_of_their_embeddings_and_of_none_row_zero():
    layer = tag_mean()
    row_NT = torch.tensor([[3, 5, 1, 0], [4, 0, 0, 0], [0, 0, 0, 0], [2, 6, 3, 1]])
    row = layer.tag.weight.detach()
    wanted = torch.stack([row[[3, 5, 1]].mean(dim=0), row[4], row[0], row[[2, 6, 3, 1]].mean(dim=0)])
    torch.testing.assert_close(layer(row_NT).detach(), wanted)
    # Where they stand does not matter, nor how the items are arranged.
    torch.testing.assert_close(layer(row_NT.flip(-1)).detach(), wanted)
    torch.testing.assert_close(layer(row_NT.view(2, 2, 4)).detach(), wanted.view(2, 2, 8))
    assert layer(row_NT[:0]).shape == (0, 8)


def test_only_the_rows_of_an_item_s_tags_learn_from_it():
    layer = tag_mean()
    layer(torch.tensor([[3, 5, 0, 0]])).sum().backward()
    learned = layer.tag.weight.grad.abs().sum(dim=1)
    assert learned.nonzero().flatten().tolist() == [3, 5]


def held(vector_MP: np.ndarray) -> ItemVectors:
    torch.manual_seed(0)
    layer = ItemVectors(vector_MP.shape[1], 8)
    layer.hold(torch.from_numpy(vector_MP.astype(np.float32)))
    layer.standardise()
    return layer


def some_vectors() -> np.ndarray:
    """Of the unknown item and of twenty: one has none, one only the second of two; the last number never changes."""
    vector_MP = np.random.default_rng(0).normal(5, 3, (21, 5))
    vector_MP[:, 4] = 7
    vector_MP[0] = vector_MP[3] = np.nan
    vector_MP[8, :2] = np.nan
    return vector_MP


@torch.no_grad()
def test_vectors_are_standardised_by_the_items_that_have_them_and_projected():
    vector_MP = some_vectors()
    layer = held(vector_MP)
    centre_P, deviation_P = np.nanmean(vector_MP, axis=0), np.nanstd(vector_MP, axis=0)
    standard_MP = np.nan_to_num((vector_MP - centre_P) / np.where(deviation_P > 0, deviation_P, np.inf))
    wanted = standard_MP @ layer.projection.weight.double().numpy().T
    np.testing.assert_allclose(layer(torch.arange(21)), wanted, atol=1e-5)
    assert not layer(torch.tensor([0, 3])).any()
    assert layer.scale_P[4] == 0
    # As large as the embedding of a field is.
    assert 0.7 < layer(torch.arange(21)).std() * 8**0.5 < 1.3


@torch.no_grad()
def test_a_mad_number_of_a_later_item_is_bounded():
    layer = held(some_vectors())
    mad = torch.tensor([[1e38, -1e38, 5.0, 5.0, -1e38]])
    most = DEVIATIONS_MAX * layer.projection.weight.abs().sum(dim=1)
    assert (layer.project(mad)[0].abs() <= most).all()


@torch.no_grad()
def test_what_was_projected_once_is_as_good_as_the_vectors():
    layer = held(some_vectors())
    item = torch.tensor([[4, 0], [8, 20]])
    wanted = layer(item)
    projected = layer.project(layer.table_MP)
    layer.hold_projected(projected)
    layer.table_MP = layer.table_MP[:0]
    torch.testing.assert_close(layer(item), wanted)
    # Vectors of other items take its place.
    layer.hold(torch.full((21, 5), NAN))
    assert not layer(item).any()


def test_a_model_that_holds_no_vectors_says_so():
    with pytest.raises(ValueError, match="holds none: load it with them, or with a table"):
        ItemVectors(5, 8)(torch.tensor([1]))
