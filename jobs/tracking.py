"""Where a training's settings, losses and figures are kept beside the checkpoint: nowhere, or in MLflow.

One seam, `TrackRun`: another tracker is another class with these methods. MLflow is imported only where it is asked
for; where its server is, MLFLOW_TRACKING_URI says, and MLFLOW_EXPERIMENT_NAME what the runs are kept under.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import msgspec
import structlog

from jobs.train import TrainJob, digest, placeless, run_folder
from models.checkpoint import Checkpoint
from models.errors import InputError, MachineError

TRACKERS = ("none", "mlflow")
# Of a curve, at most: a point is the mean of the steps up to it.
POINTS_MAX = 1_000


class TrackRun(Protocol):
    """What a tracker is told of one training."""

    def begin(self, job_id: str, settings: Mapping[str, str]) -> None:
        """Before the first step. A training that was killed and goes on has the same job_id."""
        ...

    def end(self, made: Checkpoint, losses: Sequence[tuple[int, float]]) -> None:
        """The checkpoint is written. losses: (step, loss), in the order of the steps."""
        ...

    def fail(self, error: BaseException) -> None:
        """It ended with an error."""
        ...


class Untracked:
    """Keeps nothing."""

    def begin(self, job_id: str, settings: Mapping[str, str]) -> None:
        """Nothing."""

    def end(self, made: Checkpoint, losses: Sequence[tuple[int, float]]) -> None:
        """Nothing."""

    def fail(self, error: BaseException) -> None:
        """Nothing."""


class MlflowRun:
    """A run of MLflow, found again by its job. Raises MachineError where mlflow is not installed."""

    def __init__(self) -> None:
        try:
            import mlflow
        except ImportError as error:
            raise MachineError(
                "--track mlflow needs mlflow, which is not installed: pip install 'vql-cache[mlflow]'"
            ) from error
        self._mlflow = mlflow

    def begin(self, job_id: str, settings: Mapping[str, str]) -> None:
        """One that was killed is still running by MLflow's book, and is gone on with."""
        running = self._mlflow.search_runs(
            filter_string=f"tags.`vql.job` = '{job_id}' and attributes.status = 'RUNNING'", output_format="list"
        )
        self._mlflow.start_run(run_id=running[0].info.run_id if running else None)
        self._mlflow.set_tag("vql.job", job_id)
        if not running:
            self._mlflow.log_params(dict(settings))

    def end(self, made: Checkpoint, losses: Sequence[tuple[int, float]]) -> None:
        """The id as a tag, what training says of itself, its figures and the curve of the loss."""
        manifest = made.manifest
        self._mlflow.set_tags(
            {"vql.checkpoint_id": made.checkpoint_id, **{f"vql.{k}": v for k, v in manifest.training.items()}}
        )
        self._mlflow.log_metrics(manifest.metrics)
        now_ms = int(time.time() * 1000)
        points = [self._mlflow.entities.Metric("loss", loss, now_ms, step) for step, loss in _thinned(losses)]
        run_id = self._mlflow.active_run().info.run_id
        self._mlflow.MlflowClient().log_batch(run_id, metrics=points)
        self._mlflow.end_run()

    def fail(self, error: BaseException) -> None:
        """Marked as failed, with the error's kind."""
        self._mlflow.set_tag("vql.error", type(error).__name__)
        self._mlflow.end_run(status="FAILED")


def tracker(name: str) -> TrackRun:
    """By its name. Raises InputError for none of TRACKERS, MachineError for one that is not installed."""
    if name not in TRACKERS:
        raise InputError(f"--track: {name!r} is none of {', '.join(TRACKERS)}")
    return MlflowRun() if name == "mlflow" else Untracked()


def tracked(run: TrackRun, job: TrainJob, training: Callable[[], Checkpoint], work: Path, processes: int) -> Checkpoint:
    """The training, told to a tracker. One that fails in the end costs no checkpoint: it is logged."""
    run.begin(digest(placeless(job)), _settings(job))
    try:
        made = training()
    except BaseException as error:
        run.fail(error)
        raise
    try:
        run.end(made, _losses(work, made, processes))
    except Exception as error:
        structlog.get_logger().error("the training is not tracked", error=f"{type(error).__name__}: {error}")
    return made


def _settings(job: TrainJob) -> dict[str, str]:
    fields = msgspec.to_builtins(job)
    return {name: msgspec.json.encode(value).decode().strip('"') for name, value in fields.items()}


def _losses(work: Path, made: Checkpoint, processes: int) -> list[tuple[int, float]]:
    """Of the steps; none where another machine has trained."""
    file = run_folder(work, made.manifest.model, made.manifest.training, processes) / "loss.jsonl"
    lines = file.read_bytes().splitlines() if file.is_file() else []
    return [(line["step"], line["loss"]) for line in map(msgspec.json.decode, lines)]


def _thinned(losses: Sequence[tuple[int, float]]) -> list[tuple[int, float]]:
    size = -(-len(losses) // POINTS_MAX)
    parts = [losses[at : at + size] for at in range(0, len(losses), size or 1)]
    return [(part[-1][0], sum(loss for _, loss in part) / len(part)) for part in parts]
