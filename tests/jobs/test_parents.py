"""A training that begins with a checkpoint: what it takes from it, which versions it reads, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from jobs.ingest import ingest_items
from jobs.parents import ACTIONS_MAX, Parent, all_actions, parent_of
from jobs.train import DAY_MS, check_job, run_training
from models.checkpoint import open_checkpoint
from models.counts import CountPlan
from models.errors import CheckpointError, InputError
from models.item_context import ContextFields
from tests.jobs.commands import assert_one_line
from tests.jobs.tiny import DAYS, ITEMS, SIZES, Shop, items, purchases, take, tiny_job, write_rows
from tests.small import START_MS

NEW_ITEM, NEW_CATEGORY = f"a{ITEMS}", "a new category"


def parent(shop: Shop, freeze: bool = True) -> Parent:
    return parent_of(shop.checkpoint, freeze)


def next_day(spark, log: Path) -> None:
    """A day's events are added to the log, some of them of a new item of a new category, some of a new action."""
    rows = purchases(range(DAYS, DAYS + 1))
    for row in rows[::4]:
        row["item_id"] = NEW_ITEM
        row["action"] = "a new action"
    take(spark, rows, log)
    now = [*items(), {"item_id": NEW_ITEM, "category": NEW_CATEGORY}]
    ingest_items(spark, write_rows(log.parent / "now.parquet", now), "parquet", {"category": "category"}, log)


@pytest.mark.spark
@pytest.mark.slow
def test_a_training_takes_its_parents_codebook_and_rows_and_learns_what_is_new(
    spark, shop: Shop, own_shop: Shop, tmp_path: Path
) -> None:
    next_day(spark, own_shop.log)
    began = open_checkpoint(shop.checkpoint)

    job = tiny_job(own_shop.log, epochs=1, seed=3, parent=parent(shop))
    made = run_training(spark, job, tmp_path / "work", tmp_path / "made")

    assert made.manifest.training["parent"] == began.checkpoint_id
    assert made.manifest.training["codebook"] == "frozen"
    assert made.manifest.actions == [*began.manifest.actions, "a new action"]
    # Behind the known ones, though both sort before them.
    assert made.vocabulary("item_id") == [*began.vocabulary("item_id"), NEW_ITEM]
    assert made.vocabulary("category") == [*began.vocabulary("category"), NEW_CATEGORY]
    before, after = began.tensors(), made.tensors()
    codebook = [name for name in before if name.startswith("history.codebook.")]
    assert len(codebook) == 4
    assert all(before[name].tobytes() == after[name].tobytes() for name in codebook)
    assert len(after["encoder.fields.0.weight"]) == ITEMS + 2
    assert (before["history.key.weight"] != after["history.key.weight"]).any()

    # Wherever the parent lies: the same parent, versions and seed give the same checkpoint.
    shutil.copytree(shop.checkpoint, tmp_path / "moved")
    moved = parent_of(tmp_path / "moved", freeze=True)
    again = run_training(
        spark, msgspec.structs.replace(job, parent=moved), tmp_path / "second work", tmp_path / "again"
    )
    assert again.checkpoint_id == made.checkpoint_id


@pytest.mark.spark
@pytest.mark.slow
def test_a_parent_counted_the_same_fields_when_they_had_fewer_values(spark, own_shop: Shop, tmp_path: Path) -> None:
    counts = CountPlan(fields=["item_id", "category"], half_life_ms=[None])
    job = tiny_job(own_shop.log, epochs=1, counts=counts)
    began = run_training(spark, job, tmp_path / "work", tmp_path / "began")
    next_day(spark, own_shop.log)
    next_job = msgspec.structs.replace(job, parent=parent_of(tmp_path / "began", freeze=True))
    made = run_training(spark, next_job, tmp_path / "work", tmp_path / "made")

    items, categories = began.manifest.counts.known
    assert items == ITEMS
    assert made.manifest.counts == msgspec.structs.replace(counts, known=[items + 1, categories + 1])


@pytest.mark.spark
@pytest.mark.slow
def test_the_versions_that_a_checkpoint_records_give_it_again_whatever_came_since(
    spark, own_shop: Shop, tmp_path: Path
) -> None:
    job = tiny_job(own_shop.log, epochs=1)
    first = run_training(spark, job, tmp_path / "work", tmp_path / "first")
    manifest = first.manifest
    assert (manifest.training["log_version"], manifest.items_version) == (1, 0)

    next_day(spark, own_shop.log)
    read = {"log_version": manifest.training["log_version"], "items_version": manifest.items_version}
    second = run_training(spark, tiny_job(own_shop.log, epochs=1, **read), tmp_path / "anew", tmp_path / "second")
    assert second.checkpoint_id == first.checkpoint_id
    # The negative control: the newest versions are others.
    third = run_training(spark, job, tmp_path / "work", tmp_path / "third")
    assert (third.manifest.training["log_version"], third.manifest.items_version) == (2, 1)
    assert third.checkpoint_id != first.checkpoint_id


@pytest.mark.spark
def test_a_parent_that_has_seen_more_is_refused(spark, shop: Shop, tmp_path: Path) -> None:
    job = tiny_job(shop.log, epochs=1, parent=parent(shop), before_ms=START_MS + 3 * int(DAY_MS))
    with pytest.raises(
        InputError, match=f"was trained on events up to .*, this training ends at {job.before_ms}; begin"
    ):
        run_training(spark, job, tmp_path / "work", tmp_path / "out")
    # The refusal holds on to no version of the log.
    assert list((tmp_path / "work").glob("pinned-*")) == []


@pytest.mark.spark
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model": "mean"}, 'trained with model "vql", this training has "mean"'),
        ({"fields": ()}, r'with fields \["category"\], this training has \[\]'),
        ({"half_life_ms": ((DAY_MS,), (DAY_MS,), (DAY_MS,), (None,))}, "with half-lives .*, this training has"),
        ({"counts": CountPlan(fields=["item_id"], half_life_ms=[None])}, "with counts null"),
        ({"category_code": "category"}, 'with category code null, this training has "category"'),
        ({"sizes": msgspec.structs.replace(SIZES, codewords=16)}, 'with sizes .*"codewords":8.* has .*"codewords":16'),
        ({"context": ContextFields(numbers=("price",))}, r"with numbers, tags, vectors \[\], this training has"),
    ],
)
def test_a_parent_of_other_settings_is_refused_before_anything_is_read(
    shop: Shop, tmp_path: Path, change: dict, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        run_training(
            None, tiny_job(tmp_path / "no log", parent=parent(shop), **change), tmp_path / "work", tmp_path / "out"
        )


@pytest.mark.spark
def test_a_codebook_that_is_learned_again_may_have_more_codewords(shop: Shop, tmp_path: Path) -> None:
    sizes = msgspec.structs.replace(SIZES, codewords=16, window=9)
    check_job(tiny_job(shop.log, parent=parent(shop, freeze=False), sizes=sizes), tmp_path / "out")


@pytest.mark.spark
def test_another_checkpoint_in_the_parents_place_is_refused(shop: Shop, tmp_path: Path) -> None:
    job = tiny_job(shop.log, parent=msgspec.structs.replace(parent(shop), checkpoint_id="0" * 32))
    with pytest.raises(InputError, match=f"holds checkpoint .* by now; the training began with {'0' * 32}"):
        check_job(job, tmp_path / "out")
    with pytest.raises(CheckpointError, match="nowhere is no checkpoint"):
        parent_of(tmp_path / "nowhere", freeze=True)


@pytest.mark.spark
def test_the_command_says_what_cannot_be(vql, shop: Shop, tmp_path: Path) -> None:
    train = ["train", "--log", shop.log, "--checkpoint", tmp_path / "out", "--work", tmp_path / "work"]
    said = vql(*train, "--codebook", "freeze")
    assert_one_line(said, 2, "InputError", "--codebook freeze needs a codebook: --warm-start names")
    said = vql(*train, "--warm-start", shop.checkpoint, "--codebook", "thaw")
    assert_one_line(said, 2, "InputError", "--codebook: 'thaw' is none of relearn, freeze")
    said = vql(*train, "--warm-start", shop.checkpoint, "--codebook", "freeze")
    assert_one_line(said, 2, "InputError", "was trained with", "this training has")


@pytest.mark.spark
def test_known_actions_keep_their_places_and_too_many_are_other(shop: Shop) -> None:
    began = open_checkpoint(shop.checkpoint)
    assert all_actions(began, ["other", "cart", "view"]) == ["other", "purchase", "view", "cart"]
    assert len(all_actions(began, [f"a{n}" for n in range(400)])) == ACTIONS_MAX
