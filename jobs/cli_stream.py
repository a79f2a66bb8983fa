"""The command `vql stream`: its options, and from them the plan of a stream and how it is watched."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from jobs.cli_options import CheckpointPath, Log, MaxFuture, State, choice, integer, offsets
from models.errors import InputError

if TYPE_CHECKING:
    from pipelines.positions import Shard

out = Console(highlight=False)


def stream(
    context: typer.Context,
    checkpoint: CheckpointPath,
    log: Log,
    state: State,
    until: Annotated[str, typer.Option(help="end: stop at the log's end as of now. forever: follow it.")] = "forever",
    from_: Annotated[
        str,
        typer.Option(
            "--from",
            help="resume: at the committed positions or the backfill's cut. earliest. For a topic also latest, or the "
            "offsets to read first, PARTITION=OFFSET,...",
        ),
    ] = "resume",
    partitions: Annotated[str | None, typer.Option(help="0,1,2: this process's share of the log.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="I/N: this is process I (0 and up) of N that share the log's partitions.")
    ] = None,
    topic: Annotated[
        str | None, typer.Option(help="Read this Kafka topic, at VQL_KAFKA_BOOTSTRAP_SERVERS, not the log's table.")
    ] = None,
    epoch: Annotated[
        int, typer.Option(min=1, help="The topic's epoch; raise it when the topic is created again or re-partitioned.")
    ] = 1,
    dead_letters_topic: Annotated[
        str | None,
        typer.Option(help="Send dead letters to this Kafka topic too, with reason and position as headers."),
    ] = None,
    dead_letters_table: Annotated[
        bool, typer.Option(help="Whether letters that went to the topic are kept in the log's table as well.")
    ] = True,
    max_future: MaxFuture = 600.0,
    row_cache_mb: Annotated[
        int, typer.Option(min=0, help="Rows of users who come again are kept in this much memory, in MB.")
    ] = 256,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            envvar="VQL_METRICS_PORT",
            min=0,
            max=65535,
            help="Serve /metrics, /healthz and /readyz here; 0: a free port, which is logged. Absent: not at all.",
        ),
    ] = None,
    metrics_host: Annotated[
        str, typer.Option(envvar="VQL_METRICS_HOST", help="Address to serve them at; 0.0.0.0 for a scraper outside.")
    ] = "127.0.0.1",
    drain: Annotated[
        float, typer.Option(min=0.1, help="Seconds that the last bundle may take after SIGTERM; then it is given up.")
    ] = 30.0,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error")] = "info",
) -> None:
    """Fold new events of the log into the users' rows. Kill it at will; the same command goes on.

    Logs JSON lines on standard error; on a terminal, lines for people and a live status line. SIGTERM ends it after
    its bundle. New items are seen within seconds. A store that does not answer is waited for, up to five minutes.
    Options of the Beam runner follow after --, for example:
    vql stream ... -- --runner=PortableRunner --job_endpoint=localhost:8099
    """
    from jobs.logs import configure_logs

    # Before Beam is imported, which logs while it is.
    configure_logs(log_level)
    from feature_repo.handle import StoreHandle
    from pipelines.dead_letter_topic import DeadLetterTopic
    from pipelines.kafka_settings import kafka_settings
    from pipelines.kafka_topic import KafkaLog
    from pipelines.stream import IN_PROCESS, StreamPlan, run
    from pipelines.watch import Watch

    if dead_letters_topic is None and not dead_letters_table:
        raise InputError("--no-dead-letters-table needs --dead-letters-topic: letters must be kept somewhere")
    plan = StreamPlan(
        log_path=log / "events",
        checkpoint_path=checkpoint,
        store=StoreHandle(state=state),
        dead_letters_path=log / "dead_letters",
        kafka=None if topic is None else KafkaLog(kafka=kafka_settings(), topic=topic, epoch=epoch),
        dead_letters_topic=None
        if dead_letters_topic is None
        else DeadLetterTopic(kafka=kafka_settings(), topic=dead_letters_topic, alone=not dead_letters_table),
        start=offsets("--from", from_) if "=" in from_ else choice("--from", from_, ("resume", "earliest", "latest")),
        until=choice("--until", until, ("end", "forever")),
        partitions=share_of(partitions, shard),
        future_ms_max=round(max_future * 1000),
        row_cache_bytes=row_cache_mb << 20,
    )
    watch = Watch(host=metrics_host, port=metrics_port, live=sys.stderr.isatty(), drain_s=drain)
    report = run(plan, [*IN_PROCESS, *context.args], watch)
    out.print(
        f"{report.events_folded:,} events folded in {report.seconds:.1f} s, {report.events_skipped:,} skipped as "
        f"already in their rows, {report.events_repeated:,} as sent twice, {report.events_erased:,} erased, "
        f"{report.dead_letters:,} dead letters, {report.unknown_items:,} of unknown items"
    )
    if dead_letters_topic is not None:
        out.print(
            f"{report.dead_letters_sent:,} dead letters sent to {dead_letters_topic}; "
            f"{report.dead_letters_too_large:,} too large for it, in the table"
        )


def share_of(partitions: str | None, shard: str | None) -> tuple[int, ...] | Shard | None:
    """What --partitions or --shard say. Raises InputError for both, and for what makes no sense."""
    from pipelines.positions import Shard

    if partitions is not None and shard is not None:
        raise InputError(f"--partitions {partitions} and --shard {shard} exclude each other; give one of them")
    if partitions is not None:
        return tuple(integer("--partitions", part) for part in partitions.split(","))
    if shard is None:
        return None
    index, slash, count = shard.partition("/")
    if not slash:
        raise InputError(f"--shard: {shard!r} is not as in I/N, for example 0/3")
    return Shard(index=integer("--shard", index), count=integer("--shard", count))
