"""A training ends with the same checkpoint wherever it runs and however often it is killed, or is refused at once."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest
import torch

from jobs.train import (
    DAY_MS,
    TrainJob,
    check_job,
    counted_fields,
    parse_counts,
    parse_delay_ms,
    parse_half_lives,
    run_training,
)
from models.checkpoint import open_checkpoint
from models.counts import CountPlan
from models.errors import InputError
from models.load import load_ranker
from tests.jobs.processes import kill_when, start
from tests.jobs.tiny import CATEGORIES, EPOCHS, ITEMS, SIZES, TRAIN_OPTIONS, Shop, take, tiny_job
from tests.small import START_MS
from tests.small_examples import small_plan

TRAIN_ALONE = """
import sys, msgspec, torch
from jobs.train import train_alone
from models.training import TrainPlan
torch.set_num_threads(1)
train_alone(msgspec.json.decode(sys.stdin.buffer.read(), type=TrainPlan))
"""


@pytest.mark.spark
def test_a_device_that_is_not_there_is_refused_before_anything_is_made(tmp_path):
    for device in ("tpu", "cuda"):
        if device == "cuda" and torch.cuda.is_available():
            continue
        with pytest.raises(InputError, match=f"--device: '{device}' cannot be used here"):
            check_job(TrainJob(log="log", device=device), tmp_path / "checkpoint")


def test_a_checkpoint_says_what_it_was_trained_on_and_with(shop: Shop) -> None:
    checkpoint = open_checkpoint(shop.checkpoint)
    manifest = checkpoint.manifest
    assert (manifest.model, manifest.sizes) == ("vql", SIZES)
    assert manifest.actions == ["other", "purchase", "view"]
    assert manifest.fields == ["item_id", "category"]
    assert manifest.half_life_ms == [[DAY_MS], [7 * DAY_MS], [28 * DAY_MS], [None]]
    assert manifest.training["log_version"] == 1
    assert 0 < manifest.metrics["train_loss"] < 1
    assert checkpoint.vocabulary("item_id") == sorted(f"i{n}" for n in range(ITEMS))
    assert checkpoint.vocabulary("category") == [f"c{n}" for n in range(CATEGORIES)]
    ranker = load_ranker(checkpoint, checkpoint.fold().table.feature_MF)
    assert bool(ranker.history.codebook.started)


@pytest.mark.spark
def test_the_same_job_again_returns_what_it_made(spark, own_shop: Shop, shop: Shop, tmp_path: Path) -> None:
    made = run_training(spark, tiny_job(shop.log), tmp_path / "work", own_shop.checkpoint)
    assert made.checkpoint_id == open_checkpoint(shop.checkpoint).checkpoint_id
    assert made.items_path.is_dir()
    assert list((tmp_path / "work").iterdir()) == []


@pytest.mark.spark
@pytest.mark.slow
def test_a_training_killed_midway_ends_with_the_checkpoint_of_one_that_was_not(
    spark, shop: Shop, tmp_path: Path
) -> None:
    work, out = with_examples(shop, tmp_path), tmp_path / "checkpoint"
    command = ["train", "--log", shop.log, *TRAIN_OPTIONS, "--checkpoint", out, "--work", work]
    kill_when(start(command, tmp_path), lambda: any(work.glob("vql-*/state.pt")))
    assert not out.exists()

    made = run_training(spark, tiny_job(shop.log), work, out)

    assert made.checkpoint_id == open_checkpoint(shop.checkpoint).checkpoint_id
    assert losses(work) == losses(shop.checkpoint.parent / "work")


def with_examples(shop: Shop, folder: Path) -> Path:
    """A work folder that has the shop's examples already: making them takes a cold Spark half a minute."""
    (examples,) = (path for path in (shop.checkpoint.parent / "work").glob("examples-*") if path.suffix != ".lock")
    shutil.copytree(examples, folder / "work" / examples.name)
    return folder / "work"


def losses(work: Path) -> list[float]:
    (file,) = work.glob("vql-*/loss.jsonl")
    return [json.loads(line)["loss"] for line in file.read_text().splitlines()]


@pytest.mark.slow
def test_a_worker_that_outlived_its_job_is_waited_for(tmp_path: Path) -> None:
    plan = small_plan(tmp_path)
    runs = [subprocess.Popen([sys.executable, "-c", TRAIN_ALONE], stdin=subprocess.PIPE) for _ in range(2)]
    for run in runs:
        run.communicate(msgspec.json.encode(plan), timeout=120)
    assert [run.returncode for run in runs] == [0, 0]
    lines = (Path(plan.work) / "loss.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.mark.spark
def test_two_processes_train_one_model(spark, shop: Shop, tmp_path: Path) -> None:
    work = with_examples(shop, tmp_path)
    made = run_training(spark, tiny_job(shop.log, batch=16, epochs=1), work, tmp_path / "out", processes=2)
    # Two batches of 16 at each step: as many steps in an epoch as one process has with batches of 32.
    assert len(losses(work)) * EPOCHS == len(losses(shop.checkpoint.parent / "work"))
    assert made.manifest.metrics["train_loss"] < 0.7


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"half_life_ms": ((DAY_MS,), (None,))}, "2 half-lives for 4 heads; give one per head"),
        ({"half_life_ms": ((DAY_MS,), (None, 1.0), (None,), (None,))}, "every head needs as many rates"),
        ({"model": "transformer"}, "model 'transformer' is none of vql, full, din_50"),
        ({"fields": ("category", "category")}, "each can be there once"),
        ({"fields": ("item_id",)}, "item_id is always one"),
        ({"category_code": "item_id"}, r"the category 'item_id' is none of the fields \['category'\]"),
        ({"category_code": "category", "model": "full"}, "full has no codes, which a category could be; vql has"),
    ],
)
def test_settings_that_cannot_be_trained_are_refused_before_anything_is_read(
    tmp_path: Path, change: dict, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        run_training(None, tiny_job(tmp_path / "no log", **change), tmp_path / "work", tmp_path / "out")


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_a_checkpoint_is_not_written_over_other_things(tmp_path: Path, kind: str) -> None:
    out = tmp_path / "precious"
    (out / "thesis").mkdir(parents=True) if kind == "folder" else out.write_text("thesis")
    with pytest.raises(InputError, match="precious exists and is no checkpoint; give --checkpoint another path"):
        run_training(None, tiny_job(tmp_path / "log"), tmp_path / "work", out)
    assert out.exists()


@pytest.mark.spark
def test_a_log_that_cannot_be_trained_on_is_refused(spark, shop: Shop, tmp_path: Path) -> None:
    def refused(job: TrainJob, words: str) -> None:
        with pytest.raises(InputError, match=words):
            run_training(spark, job, tmp_path / "work", tmp_path / "out")

    refused(tiny_job(tmp_path / "nowhere"), "nowhere/events is not a Delta table.*run: vql ingest")
    refused(tiny_job(shop.log, fields=("brand",)), r"items have no columns \['brand'\]; they have")
    refused(tiny_job(shop.log, log_version=99), "events is not a Delta table.*99")
    refused(tiny_job(shop.log, log_version=0), "the log holds no events")
    assert not (tmp_path / "out").exists()


@pytest.mark.spark
def test_a_log_without_a_single_example_is_refused(spark, tmp_path: Path) -> None:
    once = [
        {"event_id": u, "user_id": u, "item_id": "i", "action": "view", "event_time_ms": START_MS, "weight": 1.0}
        for u in "abc"
    ]
    take(spark, once, tmp_path / "log")
    job = tiny_job(tmp_path / "log", fields=(), model="no_history", epochs=1)
    with pytest.raises(InputError, match="log gives no examples"):
        run_training(spark, job, tmp_path / "work", tmp_path / "out")
    # The refusal holds on to no version of the log: the same job works once there is more to train on.
    assert list((tmp_path / "work").glob("pinned-*")) == []


def test_half_lives_are_read_by_unit() -> None:
    hour = DAY_MS / 24
    assert parse_half_lives(["12h", "7d", "never"]) == ((12 * hour,), (7 * DAY_MS,), (None,))
    assert parse_half_lives(["1.5d,never", "90m,30s"]) == ((1.5 * DAY_MS, None), (1.5 * hour, 30_000.0))


def test_what_is_counted_when_nothing_is_asked_for() -> None:
    assert counted_fields("vql", [], ["category"]) == counted_fields("sim+counts", [], ["category"])
    assert counted_fields("vql", [], ["category"]) == ["item_id", "category"]
    assert counted_fields("vql", ["category"], ["category", "brand"]) == ["category"]
    assert counted_fields("sim", [], ["category"]) == []
    assert parse_counts([], "7d") is None
    assert parse_counts(["item_id"], "7d,never") == CountPlan(fields=["item_id"], half_life_ms=[7 * DAY_MS, None])
    with pytest.raises(InputError, match="each can be there once"):
        parse_counts(["item_id", "item_id"], "7d")


@pytest.mark.parametrize(
    ("model", "counted", "says"),
    [
        ("din_50", ["item_id"], "din_50 is given no counts; din_50.counts is"),
        ("din_50+counts", None, "nothing to count"),
        ("vql", ["item_id", "brand"], r"counted fields \['brand'\]"),
        ("bert+counts", ["item_id"], "model 'bert.counts' is none of vql"),
    ],
)
def test_counts_that_cannot_be_are_refused(tmp_path: Path, model: str, counted: list[str] | None, says: str) -> None:
    counts = None if counted is None else CountPlan(fields=counted, half_life_ms=[None])
    job = TrainJob(log="log", model=model, fields=("category",), counts=counts)
    with pytest.raises(InputError, match=says):
        check_job(job, tmp_path / "out")


@pytest.mark.parametrize("text", ["7", "d", "", "7w", "sevend", "0h", "-1d", "nand", "infd", "1d,"])
def test_half_lives_that_are_none_are_named(text: str) -> None:
    with pytest.raises(InputError, match=f"half-life '{text.split(',')[-1]}'"):
        parse_half_lives([text])


def test_a_serving_delay_has_a_unit_and_an_end() -> None:
    assert [parse_delay_ms(text) for text in ("0", "1.5s", "15m")] == [0, 1500, 900_000]
    refused = {"never": "delay of never", "5": "serving delay '5' is not a number", "-1s": "serving delay '-1s' is not"}
    for text, words in refused.items():
        with pytest.raises(InputError, match=words):
            parse_delay_ms(text)
