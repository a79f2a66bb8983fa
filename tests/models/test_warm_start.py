"""A training that begins with a parent's parameters: what is kept to the bit, what has grown, what is refused."""

from __future__ import annotations

from pathlib import Path

import msgspec
import numpy as np
import pytest
import torch

from jobs.evaluate import score_raw
from models.checkpoint import Manifest, write_checkpoint
from models.errors import InputError
from models.timelines import FEATURES, impressions_of, timeline_files
from models.training import TrainPlan, begin, final_parameters, train, trained_ranker
from models.warm_start import WarmStart
from tests.small_examples import CATEGORIES, ITEMS, small_plan

CODEBOOK = [f"history.codebook.{name}" for name in ("codeword_GKF", "usage_GK", "total_GKF", "started")]


def child(parent: TrainPlan, folder: Path, freeze: bool, **changes) -> TrainPlan:
    """A plan over the parent's examples that begins with what the parent has come to."""
    checkpoint = folder / f"parent-{parent.model}"
    if not checkpoint.exists():
        train(parent)
        manifest = Manifest(
            model=parent.model,
            sizes=parent.sizes,
            half_life_ms=parent.half_life_ms,
            actions=parent.actions,
            fields=["item_id", "category"],
            training={},
            metrics={},
            files={},
        )
        write_checkpoint(checkpoint, manifest, final_parameters(parent), {})
    warm = WarmStart(checkpoint=str(checkpoint), freeze=freeze)
    settings = {"warm": warm, "epochs": 2, "seed": 7, "work": str(folder / f"child-{freeze}")}
    return msgspec.structs.replace(parent, **(settings | changes))


def scores(plan: TrainPlan) -> np.ndarray:
    impressions = [i for f in timeline_files(Path(plan.examples)) for i in impressions_of(f)]
    return score_raw(trained_ranker(plan), impressions).logit_N


def test_without_a_step_it_scores_as_its_parent_does(tmp_path):
    parent = small_plan(tmp_path)
    plan = child(parent, tmp_path, freeze=True, epochs=0)
    train(plan)
    assert np.array_equal(scores(plan), scores(parent))


def test_a_frozen_codebook_stays_as_it_is_to_the_bit_while_all_else_learns(tmp_path):
    parent = small_plan(tmp_path)
    plan = child(parent, tmp_path, freeze=True)
    train(plan)
    before, after = final_parameters(parent), final_parameters(plan)
    assert all(before[name].tobytes() == after[name].tobytes() for name in CODEBOOK)
    assert bool(after["history.codebook.started"])
    assert not any(np.array_equal(before[name], after[name]) for name in ("history.key.weight", "head.0.weight"))


def test_a_codebook_that_is_learned_again_starts_as_a_first_one_does(tmp_path):
    plan = child(small_plan(tmp_path), tmp_path, freeze=False)
    run = begin(plan)
    assert not bool(run.ranker.history.codebook.started)
    parent = torch.load(Path(small_plan(tmp_path).work) / "final.pt", weights_only=True)["model"]
    assert torch.equal(run.ranker.state_dict()["history.key.weight"], parent["history.key.weight"])
    train(plan)
    after = final_parameters(plan)
    assert bool(after["history.codebook.started"])
    assert not np.array_equal(after[CODEBOOK[0]], parent[CODEBOOK[0]].numpy())


def test_the_same_parent_and_seed_give_the_same_parameters(tmp_path):
    parent = small_plan(tmp_path)
    for work in ("once", "twice"):
        train(child(parent, tmp_path, freeze=True, work=str(tmp_path / work)))
    one, two = (final_parameters(child(parent, tmp_path, True, work=str(tmp_path / w))) for w in ("once", "twice"))
    assert all(one[name].tobytes() == two[name].tobytes() for name in one)


def test_known_values_keep_their_rows_and_new_ones_begin_anew(tmp_path):
    parent = small_plan(tmp_path)
    plan = child(parent, tmp_path, freeze=True)
    features = np.load(Path(plan.examples) / FEATURES)
    np.save(Path(plan.examples) / FEATURES, np.concatenate([features, [[ITEMS + 1, CATEGORIES + 1]]]))
    grown = msgspec.structs.replace(
        plan, field_rows=[ITEMS + 2, CATEGORIES + 2], actions=[*plan.actions, "returned"], epochs=0
    )
    train(grown)
    before, after = final_parameters(parent), final_parameters(grown)
    for name in ("encoder.fields.0.weight", "encoder.fields.1.weight", "history.action_value_AHD"):
        assert len(after[name]) == len(before[name]) + 1
        assert np.array_equal(after[name][:-1], before[name])
    # As in any training: values are drawn, actions begin with nothing.
    assert after["encoder.fields.0.weight"][-1].any()
    assert not after["history.action_value_AHD"][-1].any()
    assert np.array_equal(scores(grown), scores(parent))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"field_rows": [ITEMS, CATEGORIES + 1]},
            r"has encoder.fields.0.weight of \(41, 8\), this training of \(40, 8\)",
        ),
        ({"field_rows": [ITEMS + 1]}, r"do not have the same parameters: \['encoder.fields.1.weight'\]"),
        ({"model": "mean"}, "do not have the same parameters"),
    ],
)
def test_parameters_that_do_not_fit_are_named(tmp_path, change, words):
    with pytest.raises(InputError, match=words):
        begin(child(small_plan(tmp_path), tmp_path, True, **change))


def test_sizes_that_do_not_fit_are_named(tmp_path):
    parent = small_plan(tmp_path)
    sizes = msgspec.structs.replace(parent.sizes, codewords=4)
    with pytest.raises(InputError, match=r"history.codebook.codeword_GKF of \(2, 8, 8\), this training of \(2, 4, 8\)"):
        begin(child(parent, tmp_path, True, sizes=sizes))
    # Learned again, a codebook may be of another size.
    assert begin(child(parent, tmp_path, False, sizes=sizes)).ranker.history.codebook.codeword_GKF.shape == (2, 4, 8)


def test_a_codebook_that_is_not_there_is_not_frozen(tmp_path):
    parent = small_plan(tmp_path, "mean")
    with pytest.raises(InputError, match="has no codebook to freeze"):
        begin(child(parent, tmp_path, freeze=True))
    unstarted = small_plan(tmp_path / "vql", epochs=0)
    with pytest.raises(InputError, match="has no codewords yet; give --codebook relearn"):
        begin(child(unstarted, tmp_path / "vql", freeze=True))
