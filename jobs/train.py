"""`vql train`: the log to a checkpoint. Spark makes the examples, TorchDistributor runs the trainer.

Everything on the way lies in a work folder named by what decides it, and each piece is written whole: a job that
was killed at any moment continues when the same command is run again, and ends with the same checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import msgspec
import numpy as np
from pyspark.sql import SparkSession

from jobs.examples import ExamplePlan, Vocabulary, build_vocabulary, write_examples
from jobs.spark import read_delta, table_version
from models.checkpoint import OTHER_ACTION, Checkpoint, Manifest, Sizes, open_checkpoint, write_checkpoint
from models.errors import CheckpointError, InputError
from models.rivals import HISTORIES
from models.training import TrainPlan, final_parameters, train

DAY_MS = 86_400_000.0


class TrainJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to train and on what; `log_version` None reads the newest and records it."""

    log: str
    fields: tuple[str, ...] = ()
    model: str = "vql"
    sizes: Sizes = Sizes()
    half_life_ms: tuple[tuple[float | None, ...], ...] = ((DAY_MS,), (7 * DAY_MS,), (28 * DAY_MS,), (None,))
    examples: ExamplePlan = ExamplePlan()
    length: int = 512
    epochs: int = 1
    batch: int = 32
    seed: int = 0
    log_version: int | None = None


def run_training(spark: SparkSession, job: TrainJob, work: Path, out: Path, processes: int = 1) -> Checkpoint:
    """Train and write the checkpoint `out`. Raises InputError for an empty log or unknown model settings."""
    if len(job.half_life_ms) != job.sizes.heads:
        raise InputError(f"{len(job.half_life_ms)} half-lives for {job.sizes.heads} heads; give one per head")
    if len({len(head) for head in job.half_life_ms}) != 1:
        raise InputError(f"every head needs as many rates as the others: {job.half_life_ms}")
    if job.model not in HISTORIES:
        raise InputError(f"model {job.model!r} is none of {', '.join(HISTORIES)}")
    events_path = Path(job.log) / "events"
    read_delta(spark, events_path)
    version = job.log_version if job.log_version is not None else table_version(spark, events_path)
    job = msgspec.structs.replace(job, log_version=version)
    work = work / f"{job.model}-{_digest(job)}"
    if finished := _already(out, job):
        return finished
    plan, vocabulary = _prepare(spark, job, work)
    _distribute(plan, processes)
    manifest = Manifest(
        model=job.model,
        sizes=job.sizes,
        half_life_ms=[list(head) for head in job.half_life_ms],
        actions=plan.actions,
        fields=list(vocabulary.fields),
        training=_training_facts(job),
        metrics={"train_loss": _last_loss(work)},
        files={},
    )
    return write_checkpoint(out, manifest, final_parameters(plan), vocabulary.fields)


def parse_half_lives(texts: list[str]) -> tuple[tuple[float | None, ...], ...]:
    """One text per head, such as "12h", "7d", "never" or "1d,never". Raises InputError."""
    return tuple(tuple(_half_life_ms(part) for part in text.split(",")) for text in texts)


def _half_life_ms(text: str) -> float | None:
    unit_ms = {"s": 1e3, "m": 6e4, "h": 3.6e6, "d": DAY_MS}
    try:
        value = None if text == "never" else float(text[:-1]) * unit_ms[text[-1]]
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"half-life {text!r} is not a number with s, m, h or d, nor never") from error
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"half-life {text!r} is not positive")
    return value


def _prepare(spark: SparkSession, job: TrainJob, work: Path) -> tuple[TrainPlan, Vocabulary]:
    """The examples and the plan of the run."""
    events = read_delta(spark, Path(job.log) / "events", job.log_version)
    # Retractions have no place in examples; the actions of the checkpoint are those the log shows.
    seen = [row[0] for row in events.select("action").distinct().orderBy("action").limit(255).collect()]
    actions = [OTHER_ACTION, *(a for a in seen if a != OTHER_ACTION)]
    items_path = Path(job.log) / "items"
    vocabulary = build_vocabulary(spark, events, items_path if job.fields else None, list(job.fields))
    examples = work.parent / f"examples-{_digest([job.log, job.log_version, job.fields, job.examples])}"
    write_examples(spark, events, vocabulary, actions, job.examples, examples)
    plan = TrainPlan(
        model=job.model,
        examples=str(examples),
        work=str(work),
        sizes=job.sizes,
        half_life_ms=[list(head) for head in job.half_life_ms],
        actions=actions,
        field_rows=[len(values) + 1 for values in vocabulary.fields.values()],
        length=job.length,
        epochs=job.epochs,
        batch=job.batch,
        seed=job.seed,
    )
    return plan, vocabulary


def _distribute(plan: TrainPlan, processes: int) -> None:
    """Run models.training.train under TorchDistributor, on this machine's cores."""
    from pyspark.ml.torch.distributor import TorchDistributor

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    TorchDistributor(num_processes=processes, local_mode=True, use_gpu=False).run(train, plan)


def _already(out: Path, job: TrainJob) -> Checkpoint | None:
    """The checkpoint at `out` when this very job made it."""
    try:
        found = open_checkpoint(out)
    except CheckpointError:
        return None
    return found if found.manifest.training == _training_facts(job) else None


def _training_facts(job: TrainJob) -> dict[str, str | int | float]:
    return {
        "job": _digest(job),
        "log_version": job.log_version if job.log_version is not None else -1,
        "seed": job.seed,
        "epochs": job.epochs,
        "length": job.length,
    }


def _last_loss(work: Path) -> float:
    """Mean loss of the last tenth of the steps."""
    lines = (work / "loss.jsonl").read_bytes().splitlines()
    losses = [msgspec.json.decode(line)["loss"] for line in lines]
    return round(float(np.mean(losses[-max(1, len(losses) // 10) :])), 6)


def _digest(value: object) -> str:
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()[:12]
