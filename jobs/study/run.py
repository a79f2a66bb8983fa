"""The run of a study: a data set to a log, trainings, scores of what was held out, and all figures.

Whatever was made is kept in the work folder and named by what decides it: a study that was killed goes on where it
was, and one with more models or seeds makes only those.

Shapes: M items, F item fields.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from pyspark.sql import SparkSession
from pyspark.sql import functions as F
from rich.console import Console

from jobs.baskets import ExamplePlan
from jobs.bench import machine, versions
from jobs.datasets.dataset import DataSet, prepare
from jobs.evaluate import Scores, kept_scores, score_raw
from jobs.event_log import read_events
from jobs.examples import Vocabulary, build_vocabulary, extended, write_examples
from jobs.spark import read_delta, table_version
from jobs.study.compare import Difference, Over, Worth, difference, over, worth, worth_by_slice
from jobs.study.costs import Costs, costs
from jobs.study.plan import Study, Variant, check_study, lengths, seen, variants
from jobs.train import TrainJob, digest, examples_of, item_cells, known_actions, run_folder, run_training
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.files import locked, replace_file
from models.item_context import Context, ContextFields
from models.load import load_ranker
from models.ranker import Ranker
from models.request import Impression
from models.timelines import FEATURES, VECTORS, impressions_of, timeline_files

HOUR_MS = 3_600_000


class Figures(msgspec.Struct, frozen=True, kw_only=True):
    """A model's row in the file. against_reference: of GAUC. by_length: GAUC at the lengths of the ladder.

    auc, gauc, logloss: over all candidates. train_s: seconds in the steps of its training, over seeds.
    """

    auc: Over | None
    gauc: Over | None
    logloss: Over | None
    slices: dict[str, Worth]
    against_reference: Difference | None
    by_length: dict[str, Over | None]
    parameters: int
    parameters_of_ids: int
    bytes_per_user: float
    train_s: Over | None
    ms_per_500: float


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """What models are asked: impressions, over items with these embedding rows (M x F), and vectors (M x P) if any."""

    digest: str
    impressions: Sequence[Impression]
    feature_MF: np.ndarray
    vector_MP: np.ndarray | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """What a variant answered: its scores by seed at each length; its seconds of training by seed; what it costs."""

    scores: Mapping[int, Sequence[Scores]]
    train_s: Sequence[float]
    costs: Costs


def run_study(
    spark: SparkSession, study: Study, data: DataSet, path: Path | None, work: Path, console: Console
) -> dict[str, Any]:
    """All figures, as write_figures takes them. path: the folder of the data set's files, as `vql data prepare` has it.

    Raises InputError for a study or data that cannot be.
    """
    started_s = time.monotonic()
    asked_by = data.plan(study.protocol)
    # What cannot be is refused before anything is made.
    check_study(study)
    log = _log(spark, data, path, work, console)
    job = _job(spark, study, data, log)
    heldout = _held_out(spark, job, _altered(asked_by, from_ms=job.before_ms, per_user=study.test_per_user), work)
    console.print(f"{len(heldout.impressions):,} impressions of what was held out", style="dim")
    chosen = variants(study, msgspec.structs.replace(job, examples=_altered(asked_by, per_user=study.per_user)))
    asked = {variant.name: _ask(spark, study, variant, heldout, work, console) for variant in chosen}
    return {
        "data": study.data,
        "protocol": study.protocol,
        "length": study.length,
        "seeds": study.seeds,
        "reference": study.reference,
        "results": {name: _figures(study, name, asked) for name in asked},
        "impressions": len(heldout.impressions),
        "users": len({impression.user_id for impression in heldout.impressions}),
        "cut_ms": job.before_ms,
        "config": study,
        "machine": machine(),
        "versions": versions(),
        "seconds": round(time.monotonic() - started_s, 1),
    }


def cut_of(spark: SparkSession, log: Path, holdout: float) -> int:
    """The hour (Unix ms) since which the log has about this share of its events. Raises InputError if that is all."""
    hours = read_events(spark, log).groupBy(F.expr(f"event_time_ms div {HOUR_MS}").alias("hour")).count()
    table = hours.orderBy("hour").toArrow()
    hour, count = table["hour"].to_numpy(), table["count"].to_numpy()
    at = int(np.searchsorted(np.cumsum(count), (1 - holdout) * count.sum(), side="right"))
    if not 0 < at < len(hour):
        raise InputError(f"{log} has no hour that leaves {holdout:g} of its events held out, and others before it")
    return int(hour[at]) * HOUR_MS


def _altered(plan: ExamplePlan, **changes: Any) -> ExamplePlan:
    return msgspec.structs.replace(plan, **changes)


def _log(spark: SparkSession, data: DataSet, path: Path | None, work: Path, console: Console) -> Path:
    """The data set's log in the work folder, made when it is not there whole."""
    made_of = str(data.find(path))
    log = work / f"log-{digest([data.name, made_of])}"
    whole = log / "whole"
    # Studies may share a work folder; of two that begin, one makes the log and the other waits.
    with locked(log.with_name(f"{log.name}.lock")):
        if not whole.exists():
            console.print(f"{data.name} to a log", style="dim")
            prepare(spark, data, path, log)
            replace_file(whole, made_of.encode())
    return log


def _job(spark: SparkSession, study: Study, data: DataSet, log: Path) -> TrainJob:
    """A training on what is not held out; model, sizes and seed are the variants'."""
    return TrainJob(
        log=str(log),
        fields=data.fields,
        sizes=study.sizes,
        half_life_ms=study.half_life_ms,
        epochs=study.epochs,
        log_version=table_version(spark, log / "events"),
        items_version=table_version(spark, log / "items"),
        before_ms=cut_of(spark, log, study.holdout),
        context=study.context,
    )


def _held_out(spark: SparkSession, job: TrainJob, plan: ExamplePlan, work: Path) -> HeldOut:
    """The impressions since the cut, with all that came before each of them, by the code that makes examples.

    The models know the items and actions of what they were trained on; of others, the fields.
    """
    of = digest(examples_of(msgspec.structs.replace(job, examples=plan)))
    events = read_events(spark, Path(job.log), job.log_version)
    static = read_delta(spark, Path(job.log) / "items", job.items_version)
    before = events.where(F.col("event_time_ms") < job.before_ms)
    folder = work / f"heldout-{of}"
    if not (folder / FEATURES).exists():
        known = build_vocabulary(before, static, list(job.fields), job.context or ContextFields())
        write_examples(spark, events, extended(known, events, static), known_actions(before), plan, folder)
    impressions = [one for file in timeline_files(folder) for one in impressions_of(file)]
    vectors = folder / VECTORS
    return HeldOut(
        digest=of,
        impressions=impressions,
        feature_MF=np.load(folder / FEATURES),
        vector_MP=np.load(vectors) if vectors.exists() else None,
    )


def _ask(spark: SparkSession, study: Study, variant: Variant, heldout: HeldOut, work: Path, console: Console) -> Asked:
    """Train a variant with every seed, and ask each of these at every length."""
    scores: dict[int, list[Scores]] = {length: [] for length in lengths(study)}
    train_s, cost = [], None
    for seed in range(study.seeds):
        job = msgspec.structs.replace(variant.job, seed=seed)
        console.print(f"[b]{variant.name}[/b]  seed {seed}")
        checkpoint = run_training(spark, job, work / "training", work / "checkpoints" / digest(job))
        train_s.append(_train_s(work / "training", checkpoint))
        ranker = load_ranker(checkpoint, *_items(checkpoint, heldout))
        for length, by_seed in scores.items():
            by_seed.append(_scores(ranker, checkpoint, heldout, seen(variant.job.model, length), work))
        cost = cost or costs(ranker, checkpoint, heldout.impressions, study.length)
        at = worth(scores[study.length][-1:]).gauc
        console.print(f"  GAUC {at.mean:.4f}, trained in {train_s[-1]:.0f} s" if at else "  no GAUC", style="dim")
    assert cost is not None
    return Asked(scores=scores, train_s=train_s, costs=cost)


def _items(checkpoint: Checkpoint, heldout: HeldOut) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """The embedding rows of the features that the model has, what items are counted as, and their vectors.

    An ablation may have fewer fields than the data. An item that came after the training is counted by its fields.
    """
    manifest = checkpoint.manifest
    context = manifest.context or Context()
    feature_MF = np.ascontiguousarray(heldout.feature_MF[:, : len(manifest.fields) + context.columns])
    if manifest.counts is None:
        return feature_MF, None, heldout.vector_MP
    values = {field: checkpoint.vocabulary(field) for field in manifest.fields}
    cell_MQ = item_cells(manifest.model, manifest.counts, Vocabulary(fields=values, feature_MF=feature_MF))
    return feature_MF, cell_MQ, heldout.vector_MP


def _scores(ranker: Ranker, checkpoint: Checkpoint, heldout: HeldOut, length: int, work: Path) -> Scores:
    path = work / "scores" / f"{digest([checkpoint.checkpoint_id, heldout.digest, length])}.npz"
    return kept_scores(path, lambda: score_raw(ranker, heldout.impressions, length))


def _train_s(work: Path, checkpoint: Checkpoint) -> float:
    """Seconds in the steps of a training, those of every run that went on with it together.

    Raises InputError where the training's folder is gone and its checkpoint is not.
    """
    log = run_folder(work, checkpoint.manifest.model, checkpoint.manifest.training) / "loss.jsonl"
    if not log.exists():
        raise InputError(f"{log} is gone, but not what was trained there: remove {checkpoint.path} too, to train anew")
    return sum(msgspec.json.decode(line)["seconds"] for line in log.read_bytes().splitlines())


def _figures(study: Study, name: str, asked: Mapping[str, Asked]) -> Figures:
    answer, reference = asked[name], asked[study.reference]
    at = answer.scores[study.length]
    total = worth(at)
    return Figures(
        auc=total.auc,
        gauc=total.gauc,
        logloss=total.logloss,
        slices=worth_by_slice(at, study.protocol),
        against_reference=None if name == study.reference else difference(at, reference.scores[study.length]),
        by_length={str(length): worth(by_seed).gauc for length, by_seed in answer.scores.items()},
        parameters=answer.costs.parameters,
        parameters_of_ids=answer.costs.parameters_of_ids,
        bytes_per_user=answer.costs.bytes_per_user,
        train_s=over(answer.train_s),
        ms_per_500=answer.costs.ms_per_500,
    )
