"""What a tracker is told of a training, and what it may cost: nothing."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from jobs.bench_load import random_checkpoint
from jobs.tracking import POINTS_MAX, _thinned, tracked, tracker
from jobs.train import digest, run_folder
from models.checkpoint import Checkpoint
from models.errors import InputError
from tests.jobs.commands import assert_one_line
from tests.jobs.test_checkpoint_store import TINY
from tests.jobs.tiny import tiny_job

STEPS = 60
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


@pytest.fixture
def made(tmp_path: Path) -> Checkpoint:
    """A checkpoint, and in tmp_path / "work" the losses of the training that it is of."""
    checkpoint = random_checkpoint(tmp_path / "made", TINY)
    run = run_folder(tmp_path / "work", "vql", checkpoint.manifest.training)
    run.mkdir(parents=True)
    lines = [msgspec.json.encode({"step": n, "loss": 1 / n, "seconds": 0.1}) for n in range(1, STEPS + 1)]
    (run / "loss.jsonl").write_bytes(b"\n".join(lines))
    return checkpoint


def test_a_tracker_is_told_settings_the_checkpoint_and_every_loss(made: Checkpoint, tmp_path: Path) -> None:
    job, run = tiny_job(tmp_path / "log"), Told()
    assert tracked(run, job, lambda: made, tmp_path / "work", 1) is made
    (begun, job_id, settings), (ended, checkpoint_id, losses) = run.told
    assert (begun, job_id, ended, checkpoint_id) == ("begin", digest(job), "end", made.checkpoint_id)
    assert settings["model"] == "vql"
    assert settings["seed"] == "0"
    assert settings["log"] == str(tmp_path / "log")
    assert losses == [(n, 1 / n) for n in range(1, STEPS + 1)]


def test_a_training_that_fails_is_told_and_a_tracker_that_fails_costs_no_checkpoint(
    made: Checkpoint, tmp_path: Path
) -> None:
    run, job = Told(), tiny_job(tmp_path / "log")

    def killed() -> Checkpoint:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tracked(run, job, killed, tmp_path, 1)
    assert run.told[-1] == ("fail", KeyboardInterrupt)

    class Away(Told):
        def end(self, made, losses):
            raise ConnectionError("the server is away")

    assert tracked(Away(), job, lambda: made, tmp_path / "work", 1) is made
    # Trained on another machine: there are no losses here.
    elsewhere = Told()
    tracked(elsewhere, job, lambda: made, tmp_path / "elsewhere", 1)
    assert elsewhere.told[-1] == ("end", made.checkpoint_id, [])


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


@pytest.mark.skipif(not HAS_MLFLOW, reason="mlflow is not installed (pip install 'vql-cache[mlflow]')")
@pytest.mark.filterwarnings("ignore")  # mlflow's own, of the libraries that it uses
def test_mlflow_keeps_a_run_and_goes_on_with_one_that_was_killed(
    made: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    job = tiny_job(tmp_path / "log")
    # A process that is killed leaves a run that is still running.
    begin = "import os, sys; from jobs.tracking import tracker; tracker('mlflow').begin(sys.argv[1], {}); os._exit(9)"
    assert subprocess.run([sys.executable, "-c", begin, digest(job)], env=dict(os.environ)).returncode == 9

    tracked(tracker("mlflow"), job, lambda: made, tmp_path / "work", 1)

    (run,) = mlflow.search_runs(output_format="list")
    assert run.info.status == "FINISHED"
    assert run.data.tags["vql.checkpoint_id"] == made.checkpoint_id
    assert run.data.tags["vql.seed"] == "0"
    history = mlflow.MlflowClient().get_metric_history(run.info.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(n, 1 / n) for n in range(1, STEPS + 1)]

    # One that is done is not gone on with.
    with pytest.raises(KeyboardInterrupt):
        tracked(tracker("mlflow"), job, lambda: (_ for _ in ()).throw(KeyboardInterrupt), tmp_path / "work", 1)
    assert sorted(each.info.status for each in mlflow.search_runs(output_format="list")) == ["FAILED", "FINISHED"]
    (failed,) = mlflow.search_runs(filter_string="attributes.status = 'FAILED'", output_format="list")
    assert failed.data.params["model"] == "vql"
