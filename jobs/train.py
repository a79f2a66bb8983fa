"""`vql train`: the log to a checkpoint. Spark makes the examples, TorchDistributor runs the trainer.

Everything on the way lies in a work folder named by what decides it, and each piece is written whole: a job that
was killed at any moment continues when the same command is run again, and ends with the same checkpoint.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.baskets import ExamplePlan
from jobs.devices import usable_device
from jobs.event_log import LogFacts, log_facts, read_events, trained_until_ms
from jobs.examples import Vocabulary, build_vocabulary, grown, write_examples
from jobs.parents import Parent, all_actions, check_parent, check_times, known_by, opened
from jobs.spark import errors_of_workers, read_delta, table_version
from models.checkpoint import OTHER_ACTION, Checkpoint, Manifest, Sizes, open_checkpoint, write_checkpoint
from models.counts import CountPlan, exact_cells
from models.diagnostics import Diagnostics
from models.errors import CheckpointError, InputError
from models.files import locked, replace_array, replace_file
from models.item_context import ContextFields
from models.model_names import EXACT_COUNTS, counts_exactly, may_count
from models.quantisation import diagnose
from models.rivals import HISTORIES
from models.timelines import CELLS, count_impressions, drawn_events, timeline_files
from models.training import TrainPlan, final_parameters, train, trained_ranker
from models.warm_start import WarmStart

DAY_MS = 86_400_000.0
DIAGNOSED_EVENTS = 50_000
NEWEST = 50


class TrainJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to train and on what; versions None read the newest of events and items, and record which that was.

    before_ms: events from then on are as if they were not in the log. None: all of them. category_code: the
    field whose value is the code of group 0; unset, all codes are learned, and nothing that is named by a job has
    another name than before there was the choice.
    device: cuda, where products outside of attention are in bfloat16; unset, the CPU.
    context: item features beside the fields; unset, there are none. parent: what it begins with; unset, with nothing.
    """

    log: str
    fields: tuple[str, ...] = ()
    model: str = "vql"
    sizes: Sizes = Sizes(newest=NEWEST)
    half_life_ms: tuple[tuple[float | None, ...], ...] = ((DAY_MS,), (7 * DAY_MS,), (28 * DAY_MS,), (None,))
    counts: CountPlan | None = None
    examples: ExamplePlan = ExamplePlan()
    length: int = 512
    epochs: int = 1
    batch: int = 32
    patience: int = 0
    seed: int = 0
    log_version: int | None = None
    items_version: int | None = None
    before_ms: int | None = None
    category_code: str | msgspec.UnsetType = msgspec.UNSET
    device: str | msgspec.UnsetType = msgspec.UNSET
    context: ContextFields | msgspec.UnsetType = msgspec.UNSET
    parent: Parent | msgspec.UnsetType = msgspec.UNSET

    @property
    def features(self) -> tuple[str, ...]:
        """All columns of the items table that the training reads."""
        return (*self.fields, *(self.context.names if self.context else ()))


@errors_of_workers()
def run_training(spark: SparkSession, job: TrainJob, work: Path, out: Path, processes: int = 1) -> Checkpoint:
    """Train and write the checkpoint `out`. Raises InputError for an empty log or unknown model settings."""
    check_job(job, out)
    pinned = work / f"pinned-{digest([placeless(job), str(out)])}.json"
    job = _pin(spark, job, pinned)
    facts = _training_facts(job, log_facts(spark, Path(job.log) / "events"))
    work = run_folder(work, job.model, facts, processes)
    try:
        if finished := _already(out, facts):
            pinned.unlink(missing_ok=True)
            return finished
        plan, vocabulary = _prepare(spark, job, work)
    except InputError:
        # Nothing was begun: the next run is to look at the log anew.
        pinned.unlink(missing_ok=True)
        raise
    _distribute(plan, processes)
    made = write_trained(job, plan, vocabulary, facts, out)
    pinned.unlink(missing_ok=True)
    return made


def write_trained(
    job: TrainJob, plan: TrainPlan, vocabulary: Vocabulary, facts: dict[str, str | int | float], out: Path
) -> Checkpoint:
    """The checkpoint of a plan that has run. facts: Manifest.training."""
    manifest = Manifest(
        model=job.model,
        sizes=job.sizes,
        half_life_ms=plan.half_life_ms,
        actions=plan.actions,
        fields=list(vocabulary.fields),
        training=facts,
        metrics={"train_loss": _last_loss(Path(plan.work))},
        diagnostics=_diagnostics(plan) if job.model == "vql" else None,
        files={},
        counts=plan.counts,
        category_code=job.category_code,
        trained_before_ms=msgspec.UNSET if job.before_ms is None else job.before_ms,
        context=vocabulary.context or msgspec.UNSET,
        items_version=msgspec.UNSET if job.items_version is None else job.items_version,
    )
    return write_checkpoint(out, manifest, final_parameters(plan), {**vocabulary.fields, **vocabulary.tags})


def _pin(spark: SparkSession, job: TrainJob, pinned: Path) -> TrainJob:
    """The job with its versions: those of an unfinished run of the same job, else the newest.

    So a run that was killed goes on with the log as it was, whatever was ingested since.
    """
    events, items = Path(job.log) / "events", Path(job.log) / "items"
    read_delta(spark, events)
    if pinned.exists():
        kept = msgspec.json.decode(pinned.read_bytes(), type=TrainJob)
        return msgspec.structs.replace(job, log_version=kept.log_version, items_version=kept.items_version)
    if job.log_version is None:
        job = msgspec.structs.replace(job, log_version=table_version(spark, events))
    if job.features and job.items_version is None:
        read_delta(spark, items)
        job = msgspec.structs.replace(job, items_version=table_version(spark, items))
    replace_file(pinned, msgspec.json.encode(job))
    return job


def check_job(job: TrainJob, out: Path) -> None:
    """Refuse before hours of work what cannot be trained, or would write over something that is no checkpoint."""
    if job.device:
        usable_device(job.device)
    if len(job.half_life_ms) != job.sizes.heads:
        raise InputError(f"{len(job.half_life_ms)} half-lives for {job.sizes.heads} heads; give one per head")
    if len({len(head) for head in job.half_life_ms}) != 1:
        raise InputError(f"every head needs as many rates as the others: {job.half_life_ms}")
    if job.model.removesuffix(EXACT_COUNTS) not in HISTORIES:
        raise InputError(f"model {job.model!r} is none of {', '.join(HISTORIES)}, nor one of these with {EXACT_COUNTS}")
    if job.counts is not None and not may_count(job.model):
        raise InputError(f"{job.model} is given no counts; {job.model}{EXACT_COUNTS} is")
    if job.counts is None and counts_exactly(job.model):
        raise InputError(f"{job.model} has nothing to count")
    if len({"item_id", *job.features}) != 1 + len(job.features):
        raise InputError(f"fields {list(job.features)}: item_id is always one, and each can be there once")
    if job.counts and (unknown := [f for f in job.counts.fields if f not in ("item_id", *job.fields)]):
        raise InputError(f"counted fields {unknown} are none of item_id and the fields {list(job.fields)}")
    if job.category_code is not msgspec.UNSET:
        if job.category_code not in job.fields:
            raise InputError(f"the category {job.category_code!r} is none of the fields {list(job.fields)}")
        if job.model.removesuffix(EXACT_COUNTS) != "vql":
            raise InputError(f"{job.model} has no codes, which a category could be; vql has")
    if job.parent:
        check_parent(job, job.parent)
    if out.is_file() or (out.is_dir() and any(out.iterdir()) and not (out / "manifest.json").is_file()):
        raise InputError(f"{out} exists and is no checkpoint; give --checkpoint another path")


def parse_half_lives(texts: list[str]) -> tuple[tuple[float | None, ...], ...]:
    """One text per head, such as "12h", "7d", "never" or "1d,never". Raises InputError."""
    return tuple(tuple(_duration_ms(part, "half-life") for part in text.split(",")) for text in texts)


def counted_fields(model: str, asked: list[str], fields: Sequence[str]) -> list[str]:
    """What is counted: what was asked for, or, by a model that may count, the item and every field that it uses."""
    return asked or (["item_id", *fields] if may_count(model) else [])


def parse_counts(fields: list[str], half_lives: str) -> CountPlan | None:
    """Fields to count, each at half-lives such as "7d,never"; None for no field. Raises InputError."""
    if not fields:
        return None
    if len(set(fields)) != len(fields):
        raise InputError(f"counted fields {fields}: each can be there once")
    return CountPlan(fields=fields, half_life_ms=list(parse_half_lives([half_lives])[0]))


def parse_delay_ms(text: str) -> int:
    """A serving delay such as "5s" or "15m"; "0" is none. Raises InputError."""
    delay_ms = 0.0 if text == "0" else _duration_ms(text, "serving delay")
    if delay_ms is None:
        raise InputError("a serving delay of never would leave no history")
    return round(delay_ms)


def _duration_ms(text: str, what: str) -> float | None:
    unit_ms = {"s": 1e3, "m": 6e4, "h": 3.6e6, "d": DAY_MS}
    try:
        value = None if text == "never" else float(text[:-1]) * unit_ms[text[-1]]
    except (KeyError, ValueError, IndexError) as error:
        raise InputError(f"{what} {text!r} is not a number with s, m, h or d, nor never") from error
    if value is not None and not 0 < value < float("inf"):
        raise InputError(f"{what} {text!r} is not positive")
    return value


def _prepare(spark: SparkSession, job: TrainJob, work: Path) -> tuple[TrainPlan, Vocabulary]:
    """The examples and the plan of the run."""
    events = read_events(spark, Path(job.log), job.log_version)
    if job.before_ms is not None:
        events = events.where(F.col("event_time_ms") < job.before_ms)
    actions = known_actions(events)
    items = read_delta(spark, Path(job.log) / "items", job.items_version) if job.features else None
    if job.parent:
        parent = opened(job.parent)
        check_times(events, parent, trained_until_ms(spark, Path(job.log), parent), job.before_ms)
        actions = all_actions(parent, actions)
        vocabulary = grown(known_by(parent), events, items)
    else:
        vocabulary = build_vocabulary(events, items, list(job.fields), job.context or ContextFields())
    examples = work.parent / f"examples-{digest(examples_of(job))}"
    write_examples(spark, events, vocabulary, actions, job.examples, examples)
    if count_impressions(timeline_files(examples)) == 0:
        raise InputError(f"{job.log} gives no examples: no user has events at two times and items to draw against")
    return plan_training(job, examples, work, vocabulary, actions), vocabulary


def examples_of(job: TrainJob) -> list[object]:
    """What decides the examples of a training, and the features of their items."""
    of = [job.log, job.log_version, job.items_version, job.fields, job.before_ms, job.examples]
    of = [*of, job.context] if job.context else of
    # Its items keep the places that they have in the parent.
    return [*of, job.parent.checkpoint_id] if job.parent else of


def plan_training(job: TrainJob, examples: Path, work: Path, vocabulary: Vocabulary, actions: list[str]) -> TrainPlan:
    """The plan of the run over these examples; what it counts items as is written into its work folder."""
    plan = TrainPlan(
        model=job.model,
        examples=str(examples),
        work=str(work),
        sizes=job.sizes,
        half_life_ms=[list(head) for head in job.half_life_ms],
        actions=actions,
        field_rows=[len(values) + 1 for values in vocabulary.fields.values()],
        category_field=_place(job.category_code, vocabulary),
        context=vocabulary.context,
        counts=_with_known(job.counts, job.model, vocabulary),
        length=job.length,
        epochs=job.epochs,
        batch=job.batch,
        patience=job.patience,
        seed=job.seed,
        device=job.device or "cpu",
        bfloat16=bool(job.device),
        warm=WarmStart(checkpoint=job.parent.path, freeze=job.parent.freeze) if job.parent else None,
    )
    if plan.counts is not None:
        work.mkdir(parents=True, exist_ok=True)
        replace_array(work / CELLS, item_cells(job.model, plan.counts, vocabulary))
    return plan


def _with_known(counts: CountPlan | None, model: str, vocabulary: Vocabulary) -> CountPlan | None:
    """The plan of counts that knows how many values each field has; exact counts need no such thing."""
    if counts is None or counts_exactly(model):
        return counts
    return msgspec.structs.replace(counts, known=[len(vocabulary.fields[field]) for field in counts.fields])


def _place(field: str | msgspec.UnsetType, vocabulary: Vocabulary) -> int | None:
    return None if field is msgspec.UNSET else list(vocabulary.fields).index(field)


def item_cells(model: str, counts: CountPlan, vocabulary: Vocabulary) -> np.ndarray:
    """What each item is counted as (M Q); row 0, the unknown item, is not."""
    fields = list(vocabulary.fields)
    if counts_exactly(model):
        return exact_cells(vocabulary.feature_MF, fields, counts)

    def cells(field: str) -> np.ndarray:
        by_row = ["", *vocabulary.fields[field]]
        return counts.cells_of(field, by_row, range(len(by_row)))[vocabulary.feature_MF[:, fields.index(field)]]

    return np.stack([cells(field) for field in counts.fields], axis=1)


def known_actions(events: DataFrame) -> list[str]:
    """The actions of a checkpoint that is trained on these events: those they show."""
    seen = [row[0] for row in events.select("action").distinct().orderBy("action").limit(255).collect()]
    return [OTHER_ACTION, *(a for a in seen if a != OTHER_ACTION)]


def _distribute(plan: TrainPlan, processes: int) -> None:
    """Run the trainer under TorchDistributor, on this machine's cores."""
    from pyspark.ml.torch.distributor import TorchDistributor

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    TorchDistributor(num_processes=processes, local_mode=True, use_gpu=plan.device != "cpu").run(train_alone, plan)


def train_alone(plan: TrainPlan) -> None:
    """models.training.train, once what a killed run left behind is done with the same work folder.

    torchrun starts its workers in sessions of their own: they outlive a kill of the job.
    """
    if os.environ.get("RANK", "0") != "0":
        train(plan)
        return
    with locked(Path(plan.work)):
        train(plan)


def _already(out: Path, facts: dict[str, str | int | float]) -> Checkpoint | None:
    """The checkpoint at `out` if this very job made it. Raises InputError for another's: rankers may read it."""
    try:
        found = open_checkpoint(out)
    except CheckpointError:
        return None
    if found.manifest.training != facts:
        raise InputError(
            f"{out} holds checkpoint {found.checkpoint_id} of another training; give --checkpoint another path"
        )
    return found


def _training_facts(job: TrainJob, log: LogFacts) -> dict[str, str | int | float]:
    """What decides the parameters. The log is named by its id: where it lies does not matter."""
    facts = {
        "job": digest(msgspec.structs.replace(placeless(job), log=log.log_id)),
        "log_version": job.log_version if job.log_version is not None else -1,
        "seed": job.seed,
        "epochs": job.epochs,
        "length": job.length,
        "serving_delay_ms": job.examples.serving_delay_ms,
    }
    if job.parent:
        facts |= {"parent": job.parent.checkpoint_id, "codebook": "frozen" if job.parent.freeze else "relearned"}
    return facts


def placeless(job: TrainJob) -> TrainJob:
    """The job, wherever its parent lies."""
    return msgspec.structs.replace(job, parent=msgspec.structs.replace(job.parent, path="")) if job.parent else job


def run_folder(work: Path, model: str, facts: Mapping[str, str | int | float], processes: int = 1) -> Path:
    """Where a training with these facts (Manifest.training) has its state and its log, loss.jsonl."""
    # The number of processes decides the batches, and so the result.
    return work / f"{model}-{digest([facts, processes])}"


def _diagnostics(plan: TrainPlan) -> Diagnostics:
    """Of the trained model, on events of its training."""
    return diagnose(trained_ranker(plan), drawn_events(timeline_files(Path(plan.examples)), DIAGNOSED_EVENTS))


def _last_loss(work: Path) -> float:
    """Mean loss of the last tenth of the steps."""
    lines = (work / "loss.jsonl").read_bytes().splitlines()
    losses = [msgspec.json.decode(line)["loss"] for line in lines]
    return round(float(np.mean(losses[-max(1, len(losses) // 10) :])), 6)


def digest(value: object) -> str:
    """A name for what is made of this value alone."""
    return hashlib.sha256(msgspec.json.encode(value)).hexdigest()[:12]
