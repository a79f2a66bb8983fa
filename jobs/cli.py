"""The command line `vql`: each command parses, calls one function, and prints what it did.

Errors of this product are one line and an exit code (see models.errors); --debug shows the stack.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from msgspec import UNSET
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cli_audit import audit
from jobs.cli_bench import app as bench
from jobs.cli_data import app as data
from jobs.cli_dead_letters import app as dead_letters
from jobs.cli_doctor import doctor
from jobs.cli_evaluate import evaluate
from jobs.cli_forget import forget
from jobs.cli_inspect import inspect
from jobs.cli_options import (
    COUNT_HALF_LIVES,
    HALF_LIVES,
    LOCAL,
    CheckpointPath,
    Codebook,
    Counted,
    CountHalfLives,
    HalfLives,
    ItemsVersion,
    Log,
    Master,
    MaxFuture,
    NoCounts,
    Number,
    State,
    Tags,
    Vector,
    WarmStart,
    choice,
    declared,
    offsets,
    pairs,
    path_or_url,
)
from jobs.cli_release import app as release
from jobs.cli_serve import serve
from jobs.cli_size import size
from jobs.cli_stream import stream
from jobs.process_end import ended_at_once
from models.errors import InputError, VqlError
from models.files import disk_error
from models.model_names import MODELS

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="A streaming per-codeword cache that gives rankers attention over a user's whole history.\n\n"
    "The way of an event: [b]ingest[/b] (files to the log), [b]train[/b] (log to checkpoint), [b]encode-items[/b], "
    "[b]backfill[/b] (log to rows), [b]stream[/b] (new events into rows), [b]serve[/b] (scores over HTTP). "
    "[b]release[/b] takes a checkpoint to rankers in steps: judged, backfilled, live, and back. "
    "[b]rank[/b] shows one user; [b]demo[/b] goes all of it; [b]data[/b] makes logs of public data sets, "
    "[b]evaluate[/b] compares models on one, [b]inspect[/b] shows a checkpoint. "
    "[b]dead-letters[/b] shows what the stream refused, [b]doctor[/b] what is wrong with the store, [b]audit[/b] which "
    "rows are; [b]forget[/b] erases a user; [b]bench[/b] measures, [b]size[/b] tells the memory of a store.",
)
app.add_typer(dead_letters, name="dead-letters")
app.add_typer(bench, name="bench")
app.add_typer(data, name="data")
app.add_typer(release, name="release")
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

# Absolute, because executors and workers have working folders of their own.
Input = Annotated[Path, typer.Option("--input", resolve_path=True, help="A Parquet or CSV file or folder.")]
Columns = Annotated[
    list[str], typer.Option("--column", help="FIELD=SQL expression over the file's columns; repeatable.")
]


def _version(value: bool) -> None:
    if value:
        out.print(importlib.metadata.version("vql-cache"))
        raise typer.Exit


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show the stack of an error.")] = False,
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True)] = False,
) -> None:
    if debug:
        os.environ["VQL_DEBUG"] = "1"


@app.command()
def ingest(
    log: Log,
    source: Annotated[
        Path | None, typer.Option("--input", resolve_path=True, help="A Parquet or CSV file or folder.")
    ] = None,
    from_: Annotated[str, typer.Option("--from", help="files, or kafka at VQL_KAFKA_BOOTSTRAP_SERVERS")] = "files",
    topic: Annotated[str | None, typer.Option(help="The Kafka topic: up to its end as of now.")] = None,
    continuous: Annotated[bool, typer.Option("--continuous", help="Follow the topic until SIGTERM.")] = False,
    batch_records: Annotated[int, typer.Option(min=1, help="Records of a topic in one commit, at most.")] = 500_000,
    max_future: MaxFuture = 600.0,
    format_: Annotated[str, typer.Option("--format", help="parquet or csv (with a header)")] = "parquet",
    column: Columns = [],
    where: Annotated[str, typer.Option(help="SQL condition: which rows of the file to take.")] = "true",
    partitions: Annotated[int, typer.Option(min=1, help="Partitions of a new log; an existing one keeps its own.")] = 4,
    epoch: Annotated[
        int,
        typer.Option(
            min=1,
            help="Epoch of a new log: one more than the log it replaces. Of a topic: raised when the topic is created "
            "again or re-partitioned.",
        ),
    ] = 1,
    master: Master = LOCAL,
) -> None:
    """Append the events of a file or of a Kafka topic to the log, each with a partition and an offset.

    Running it again appends nothing twice. Rows that are no events go to the table quarantine with the reason. A topic
    keeps its own partitions and offsets.

    Example: vql ingest --input buys.csv --format csv --log build/log --column user_id=customer
    --column "event_time_ms=unix_millis(to_timestamp(bought_at))" --column "action='purchase'"
    """
    if choice("--from", from_, ("files", "kafka")) == "kafka":
        from jobs.cli_ingest import ingest_from_kafka, topic_source

        if topic is None or source is not None:
            raise InputError("--from kafka reads a topic: give --topic, and no --input")
        taken = ingest_from_kafka(
            topic_source(topic, epoch, batch_records, round(max_future * 1000)), log, continuous, master
        )
        say(f"{taken.records:,} records read: {taken.events:,} appended, {taken.quarantined:,} quarantined")
        return
    if source is None or topic is not None or continuous:
        raise InputError("--from files reads a file: give --input, and neither --topic nor --continuous")
    from jobs.ingest import EventSource, NewLog
    from jobs.ingest import ingest as run
    from jobs.spark import open_spark

    chosen = EventSource(path=source, format=format_, columns=pairs(column), where=where)
    report = run(open_spark(master), chosen, log, NewLog(partitions=partitions, epoch=epoch))
    say(
        f"{report.read:,} rows read: {report.appended:,} events appended, {report.already:,} already in the log, "
        f"{report.quarantined:,} quarantined"
        + (f", {report.forgotten:,} of forgotten users" if report.forgotten else "")
    )


@app.command("ingest-items")
def ingest_items(
    source: Input,
    log: Log,
    format_: Annotated[str, typer.Option("--format", help="parquet or csv (with a header)")] = "parquet",
    column: Columns = [],
    master: Master = LOCAL,
) -> None:
    """Replace the log's table of static item context: a row per item with item_id and the declared features.

    A feature is text, also a number (vql train --number) and tags with | between; or an array, of tags or of the
    numbers of a precomputed vector. A CSV file has arrays as text: --column "image=from_json(image, 'array<float>')".
    """
    from jobs.ingest import ingest_items as run
    from jobs.spark import open_spark

    say(f"{run(open_spark(master), source, format_, pairs(column), log):,} items")


@app.command()
def train(
    log: Log,
    checkpoint: Annotated[
        Path,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="Where to write the checkpoint. A URL's training can be gone on with by another machine.",
        ),
    ],
    work: Annotated[
        Path,
        typer.Option(resolve_path=True, help="Folder for examples and state, seen by executors too; resumed from."),
    ],
    model: Annotated[
        str, typer.Option(help=f"One of {', '.join(MODELS)}; a rival with +counts is given exact ones.")
    ] = "vql",
    field: Annotated[list[str], typer.Option(help="An item field to use, from vql ingest-items; repeatable.")] = [],
    number: Number = [],
    tags: Tags = [],
    vector: Vector = [],
    half_life: HalfLives = HALF_LIVES,
    count: Counted = [],
    no_counts: NoCounts = False,
    count_half_life: CountHalfLives = COUNT_HALF_LIVES,
    groups: Annotated[int, typer.Option(min=1, help="Groups of heads, each with a codebook.")] = 4,
    codewords: Annotated[int, typer.Option(min=2, help="Codewords of each group.")] = 256,
    category_code: Annotated[
        str | None, typer.Option(help="The field whose value is the code of the first group, instead of a learned one.")
    ] = None,
    window: Annotated[int, typer.Option(min=0, help="W: recent events kept raw in a row, at most 2 W.")] = 64,
    newest: Annotated[
        int | None,
        typer.Option(min=0, help="Newest of these, which vql also attends one by one; absent: 50, W if that is less."),
    ] = None,
    length: Annotated[
        int,
        typer.Option(min=1, help="Newest events for exact attention: all that rivals see; vql, at first."),
    ] = 512,
    epochs: Annotated[int, typer.Option(min=1)] = 1,
    patience: Annotated[
        int, typer.Option(min=0, help="Stop after so many epochs without a better GAUC of held-out users; 0: never.")
    ] = 0,
    per_user: Annotated[int, typer.Option(min=1, help="Training impressions per user at most.")] = 16,
    batch: Annotated[int, typer.Option(min=1, help="Impressions of a step.")] = 32,
    serving_delay: Annotated[
        str, typer.Option(help="How far rankers lag behind events, as 5s or 15m: histories end so long before now.")
    ] = "0",
    seed: int = 0,
    log_version: Annotated[int | None, typer.Option(help="Delta version of the log to read; newest if absent.")] = None,
    items_version: ItemsVersion = None,
    before_ms: Annotated[
        int | None,
        typer.Option(help="Train on events before this time alone, Unix ms: vql release gate needs later ones."),
    ] = None,
    processes: Annotated[int, typer.Option(min=1, help="Training processes.")] = 1,
    device: Annotated[
        str, typer.Option(help="cpu, or cuda: a GPU, with the products outside of attention in bfloat16.")
    ] = "cpu",
    warm_start: WarmStart = None,
    codebook: Codebook = "relearn",
    track: Annotated[
        str, typer.Option(help="none, or mlflow: settings and figures go to MLFLOW_TRACKING_URI.")
    ] = "none",
    master: Master = LOCAL,
) -> None:
    """Train a model on the log and write a checkpoint. After a kill, the same command continues.

    Spark makes the examples, on any master; the training itself runs on the driver's machine. The same log and items
    versions, seed and parent give the same checkpoint. spark-submit jobs/cli.py train ... does the same, on its master.
    """
    from jobs.baskets import ExamplePlan
    from jobs.parents import parent_of
    from jobs.releases.table import live_path
    from jobs.spark import open_spark
    from jobs.tracking import tracked, tracker
    from jobs.train import (
        NEWEST,
        TrainJob,
        check_job,
        counted_fields,
        parse_counts,
        parse_delay_ms,
        parse_half_lives,
    )
    from jobs.training_store import train_to, work_of
    from models.checkpoint import Sizes

    frozen = choice("--codebook", codebook, ("relearn", "freeze")) == "freeze"
    if frozen and warm_start is None:
        raise InputError("--codebook freeze needs a codebook: --warm-start names the checkpoint that has it")
    half_lives = parse_half_lives(half_life)
    numbers = {"groups": groups, "codewords": codewords, "window": window}
    numbers["newest"] = min(NEWEST, window) if newest is None else newest
    job = TrainJob(
        log=str(log),
        fields=tuple(field),
        model=model,
        sizes=_sizes(Sizes, heads=len(half_lives), **numbers),
        half_life_ms=half_lives,
        counts=None if no_counts else parse_counts(counted_fields(model, count, field), count_half_life),
        examples=ExamplePlan(per_user=per_user, seed=seed, serving_delay_ms=parse_delay_ms(serving_delay)),
        length=length,
        epochs=epochs,
        batch=batch,
        patience=patience,
        seed=seed,
        log_version=log_version,
        before_ms=before_ms,
        category_code=category_code or UNSET,
        device=UNSET if device == "cpu" else device,
        context=declared(number, tags, vector),
        items_version=items_version,
        parent=UNSET if warm_start is None else parent_of(live_path(warm_start), frozen),
    )
    check_job(job, Path(checkpoint))
    run, folder = tracker(track), work_of(job, work, checkpoint)
    made = tracked(
        run, job, lambda: train_to(open_spark(master), job, folder, checkpoint, processes), folder, processes
    )
    loss = made.manifest.metrics["train_loss"]
    say(f"checkpoint {made.checkpoint_id} in {checkpoint}, training loss {loss:.4f}")


@app.command("encode-items")
def encode_items(
    checkpoint: Annotated[
        Path,
        typer.Option(
            parser=path_or_url,
            metavar="PATH|URL",
            help="A checkpoint, or a table of releases: all that are not retired.",
        ),
    ],
    log: Log,
    master: Master = LOCAL,
) -> None:
    """Add the log's new items to the checkpoint's item table: a code per group and a value per head."""
    from jobs.encode_items import encode_items as run
    from jobs.releases.table import checkpoint_paths
    from jobs.spark import open_spark
    from models.checkpoint import open_checkpoint

    if isinstance(checkpoint, str):
        from jobs.checkpoint_store import fetch_checkpoint, put_items

        path = fetch_checkpoint(checkpoint)
        added, total = run(open_spark(master), open_checkpoint(path), log)
        put_items(path, checkpoint)
        say(f"{added:,} items added; the table holds {total:,}")
        return
    paths = checkpoint_paths(checkpoint)
    for path in paths:
        added, total = run(open_spark(master), open_checkpoint(path), log)
        say(f"{added:,} items added; the table holds {total:,}" + ("" if paths == [checkpoint] else f": {path}"))


@app.command()
def backfill(
    checkpoint: CheckpointPath,
    log: Log,
    state: State,
    cut: Annotated[
        str | None, typer.Option(help="PARTITION=OFFSET,... to fold up to; the log's end if absent.")
    ] = None,
    puts_per_s: Annotated[
        float,
        typer.Option(min=0, help="Rows that the store is given in a second by all executors together; 0: no limit."),
    ] = 2_000.0,
    master: Master = LOCAL,
) -> None:
    """Write the rows of every user at a cut of the log. The stream of the checkpoint then starts there.

    It may be run beside the stream and the rankers: a put takes Redis about a tenth of a millisecond, so the usual
    2,000 in a second leave it most of its time. After a kill, the same command puts only the rows that are missing.
    """
    from feature_repo.handle import StoreHandle
    from feature_repo.repo import open_repo, register
    from jobs.backfill import backfill as run
    from jobs.logs import configure_logs
    from jobs.spark import open_spark
    from models.checkpoint import open_checkpoint

    configure_logs("info")
    opened, until = open_checkpoint(checkpoint), None if cut is None else offsets("--cut", cut)
    register(open_repo(state), opened.checkpoint_id)
    done = run(open_spark(master, stage_bars=False), opened, log, StoreHandle(state=state), until, puts_per_s)
    say(
        f"{done.users:,} rows with {done.events:,} events, complete up to {done.cut}, revision {done.revision}; "
        f"{done.newer:,} were there already, and newer"
    )


app.command(context_settings={"allow_extra_args": True})(stream)
app.command()(evaluate)
app.command()(inspect)
app.command()(serve)
app.command()(audit)
app.command()(doctor)
app.command()(forget)
app.command()(size)


@app.command()
def rank(
    user: Annotated[str, typer.Argument(help="The user id.")],
    candidates: Annotated[str, typer.Option(help="Item ids, with commas between.")],
    checkpoint: CheckpointPath,
    state: State,
    now_ms: Annotated[int | None, typer.Option(help="Time of the request, Unix ms; the clock's if absent.")] = None,
) -> None:
    """Score candidates for a user from the row in the feature store."""
    from jobs.rank import rank_user

    ranked = rank_user(user, [c for c in candidates.split(",") if c], checkpoint, state, now_ms)
    # Text, because ids may hold what the console takes for markup.
    table = Table(title=Text(f"user {user}: {ranked.events:,} events, stamp {ranked.stamp}"))
    table.add_column("#", justify="right")
    table.add_column("item")
    table.add_column("score", justify="right")
    table.add_column("")
    for place, (item, score, known) in enumerate(ranked.candidates, 1):
        table.add_row(str(place), Text(item), f"{score:+.4f}", "" if known else "unknown item")
    out.print(table)


@app.command()
def setup() -> None:
    """Check Java and fetch the jars of Delta and of Spark's Kafka reader, once; jobs fetch what they lack."""
    from jobs.jars import cache_folder, delta_jars, kafka_source_jars, require_java

    java, delta, kafka = require_java(), delta_jars(), kafka_source_jars()
    say(f"Java: {java}; {len(delta)} Delta jars and {len(kafka)} Kafka jars in {cache_folder()}")


@app.command()
def demo(
    folder: Annotated[Path, typer.Option(help="Where to work; replaces an earlier demo.")] = Path("build/demo"),
) -> None:
    """Take a real purchase log the whole way, check every part against an independent one, and write a report."""
    from jobs.logs import configure_logs

    # Before Beam is imported, which logs while it is. Progress is shown; lines are for what goes wrong.
    configure_logs("warning")
    from jobs.demo import run_demo

    run_demo(folder, out)


def main() -> None:
    """Entry point: errors of this product become one line and an exit code."""
    try:
        app()
    except Exception as error:
        if os.environ.get("VQL_DEBUG"):
            raise
        shown = disk_error(error, Path(error.filename or "?")) if isinstance(error, OSError) else error
        err.print(f"[red]vql: {type(shown).__name__}:[/red] ", end="")
        first = next(iter(str(shown).strip().splitlines()), "")
        foreseen = isinstance(shown, VqlError)
        err.print(str(shown) if foreseen else f"{first} (--debug shows more)", markup=False, soft_wrap=True)
        sys.exit(shown.exit_code if foreseen else 1)


def say(line: str) -> None:
    """A command's answer, on one line however long: a path that is cut in two cannot be copied."""
    out.print(line, soft_wrap=True)


def _sizes(make, **numbers):
    try:
        return make(**numbers)
    except ValueError as error:
        raise InputError(str(error)) from error


def process() -> None:
    """`main` as a process of its own."""
    ended_at_once(main)


if __name__ == "__main__":
    process()
