"""A checkpoint scores as the ranker it was written from, or says why it cannot."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
import torch

from models.checkpoint import Checkpoint, write_checkpoint
from models.errors import CheckpointError
from models.load import load_ranker
from models.ranker import Ranker, Shape
from models.request import Impression, collate
from models.rivals import HISTORIES
from tests.small import START_MS
from tests.small_examples import CATEGORIES, ITEMS, SIZES, feature_table
from tests.small_ranker import ACTIONS, HALF_LIVES, scoring_checkpoint

SHAPE = Shape(sizes=SIZES, half_life_ms=HALF_LIVES, actions=len(ACTIONS), field_rows=[ITEMS + 1, CATEGORIES + 1])


def request():
    rng = np.random.default_rng(0)
    return collate(
        [
            Impression(
                user_id="u",
                now_ms=START_MS + 1000,
                candidate_C=np.arange(1, 6),
                label_C=np.array([1, 0, 0, 0, 0]),
                item_L=rng.integers(0, ITEMS, 9),
                action_L=rng.integers(0, len(ACTIONS), 9),
                time_ms_L=START_MS + np.arange(9),
                weight_L=np.ones(9, np.float32),
            )
        ]
    )


def again(checkpoint: Checkpoint, **changes) -> Checkpoint:
    """The same checkpoint with another manifest or other tensors."""
    tensors = changes.pop("tensors", None) or checkpoint.tensors()
    vocabularies = {f: checkpoint.vocabulary(f) for f in checkpoint.manifest.fields}
    manifest = msgspec.structs.replace(checkpoint.manifest, **changes)
    return write_checkpoint(checkpoint.path.with_name("again"), manifest, tensors, vocabularies)


@pytest.mark.parametrize("model", HISTORIES)
def test_a_loaded_ranker_scores_as_the_one_that_was_saved(tmp_path, model):
    torch.manual_seed(3)
    ranker = Ranker(SHAPE, torch.from_numpy(feature_table()), HISTORIES[model](SHAPE)).eval()
    tensors = {name: tensor.numpy() for name, tensor in ranker.state_dict().items()}
    loaded = load_ranker(again(scoring_checkpoint(tmp_path / "c"), model=model, tensors=tensors), feature_table())
    with torch.inference_mode():
        wanted, found = ranker(request())[0], loaded(request())[0]
    assert torch.equal(wanted, found)
    assert wanted.std() > 0
    assert not loaded.training


def test_the_features_are_those_of_the_items_asked_about(tmp_path):
    checkpoint, feature_MF = scoring_checkpoint(tmp_path / "c"), feature_table()
    feature_MF[1] = feature_MF[2]
    with torch.inference_mode():
        same = load_ranker(checkpoint, feature_MF)(request())[0]
        other = load_ranker(checkpoint, feature_table())(request())[0]
    assert same[0, 0] == same[0, 1]
    assert other[0, 0] != other[0, 1]


def test_an_unknown_model_is_refused_by_name(tmp_path):
    checkpoint = again(scoring_checkpoint(tmp_path / "c"), model="transformer")
    with pytest.raises(CheckpointError, match=r"model 'transformer'; known are .*vql"):
        load_ranker(checkpoint, feature_table())


def test_parameters_that_do_not_fit_the_manifest_are_refused(tmp_path):
    sizes = msgspec.structs.replace(SIZES, key_width=8)
    checkpoint = again(scoring_checkpoint(tmp_path / "c"), sizes=sizes)
    with pytest.raises(CheckpointError, match="do not fit its manifest"):
        load_ranker(checkpoint, feature_table())
