"""What a tracker is told of a training, and what it may cost: nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from jobs.tracking import POINTS_MAX, _thinned, tracked, tracker
from jobs.train import digest, run_folder
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import InputError
from tests.jobs.commands import assert_one_line
from tests.jobs.tiny import Shop, tiny_job

HAS_MLFLOW = importlib.util.find_spec("mlflow") is not None


class Told:
    """Remembers what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple] = []

    def begin(self, job_id, settings):
        self.told.append(("begin", job_id, settings))

    def end(self, made, losses):
        self.told.append(("end", made.checkpoint_id, losses))

    def fail(self, error):
        self.told.append(("fail", type(error)))


def shop_work(shop: Shop) -> Path:
    return shop.checkpoint.parent / "work"


@pytest.mark.spark
def test_a_tracker_is_told_settings_the_checkpoint_and_every_loss(shop: Shop) -> None:
    job, run, made = tiny_job(shop.log), Told(), open_checkpoint(shop.checkpoint)
    assert tracked(run, job, lambda: made, shop_work(shop), 1) is made
    (begun, job_id, settings), (ended, checkpoint_id, losses) = run.told
    assert (begun, job_id, ended, checkpoint_id) == ("begin", digest(job), "end", made.checkpoint_id)
    assert settings["model"] == "vql"
    assert settings["seed"] == "0"
    assert settings["log"] == str(shop.log)
    lines = (run_folder(shop_work(shop), "vql", made.manifest.training) / "loss.jsonl").read_bytes().splitlines()
    assert losses == [(n + 1, msgspec.json.decode(line)["loss"]) for n, line in enumerate(lines)]
    assert len(losses) > 50


@pytest.mark.spark
def test_a_training_that_fails_is_told_and_a_tracker_that_fails_costs_no_checkpoint(shop: Shop, tmp_path: Path) -> None:
    run, made = Told(), open_checkpoint(shop.checkpoint)

    def killed() -> Checkpoint:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracked(run, tiny_job(shop.log), killed, tmp_path, 1)
    assert run.told[-1] == ("fail", KeyboardInterrupt)

    class Away(Told):
        def end(self, made, losses):
            raise ConnectionError("the server is away")

    assert tracked(Away(), tiny_job(shop.log), lambda: made, tmp_path, 1) is made


def test_a_long_curve_is_thinned_and_keeps_its_mean_and_its_end() -> None:
    losses = [(step, float(step % 7)) for step in range(1, 7_001)]
    points = _thinned(losses)
    assert len(points) == POINTS_MAX
    assert points[-1] == (7_000, 3.0)
    assert _thinned(losses[:5]) == losses[:5]
    assert _thinned([]) == []


def test_a_tracker_that_is_none_is_named() -> None:
    with pytest.raises(InputError, match="--track: 'wandb' is none of none, mlflow"):
        tracker("wandb")


@pytest.mark.spark
@pytest.mark.skipif(HAS_MLFLOW, reason="mlflow is installed here")
def test_where_mlflow_is_not_installed_it_is_said_before_anything_begins(vql, tmp_path: Path) -> None:
    said = vql("train", "--log", tmp_path, "--checkpoint", tmp_path / "c", "--work", tmp_path, "--track", "mlflow")
    assert_one_line(said, 6, "MachineError", "--track mlflow needs mlflow", "vql-cache[mlflow]")


@pytest.mark.spark
@pytest.mark.skipif(not HAS_MLFLOW, reason="mlflow is not installed (pip install 'vql-cache[mlflow]')")
def test_mlflow_keeps_a_run_and_goes_on_with_one_that_was_killed(
    shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "runs").as_uri())
    job, made = tiny_job(shop.log), open_checkpoint(shop.checkpoint)
    # A process that is killed leaves a run that is still running.
    begin = "import os, sys; from jobs.tracking import tracker; tracker('mlflow').begin(sys.argv[1], {}); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", begin, digest(job)], env=dict(os.environ)).returncode == 9

    tracked(tracker("mlflow"), job, lambda: made, shop_work(shop), 1)

    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED"
    assert run.data.tags["vql.checkpoint_id"] == made.checkpoint_id
    assert run.data.metrics["train_loss"] == made.manifest.metrics["train_loss"]
    assert len(mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")) > 50
