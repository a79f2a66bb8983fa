"""The stream: keeps the rows of one checkpoint up to date with a log. `build` is the whole of it on one screen.

Read, parse, encode and update are fused into one stage with no shuffle in between: a runner finalises the positions
of a bundle only after its puts, so a stream that dies at any moment repeats at most one bundle, which the rows'
stamps skip. Several streams, each with its share of the partitions, or by mistake with the same ones, are safe.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import apache_beam as beam
import structlog
from apache_beam.io.unbounded_source import ReadFromUnboundedSource, UnboundedSource
from apache_beam.options.pipeline_options import PipelineOptions
from apache_beam.runners.runner import PipelineResult

from feature_repo.forgotten import FORGOTTEN, ForgottenRef, read_forgotten
from feature_repo.store import bind_topic
from models.checkpoint import open_checkpoint
from models.errors import InputError, StoreError
from models.event import FUTURE_MS_MAX
from models.user_hash import chosen_key_file
from pipelines.dead_letter_topic import DeadLetterTopic
from pipelines.delta_source import DeltaSource, open_log
from pipelines.drain import drained_by_signals
from pipelines.encode import EncodeEvents
from pipelines.health import Health
from pipelines.held_letters import HELD_S
from pipelines.in_process import IN_PROCESS, prepare_runner
from pipelines.kafka_source import KafkaSource
from pipelines.kafka_topic import KafkaLog, Start, open_topic, topic_positions
from pipelines.keep_dead_letters import KeepDeadLetters, LetterKeeper
from pipelines.metrics import process_metrics
from pipelines.parse import LETTERS, ParseRecords
from pipelines.portable import run_job
from pipelines.positions import Shard, slices, start_positions
from pipelines.records import Ledger, Slice
from pipelines.row_cache import ROW_CACHE_BYTES
from pipelines.update import UpdateRows
from pipelines.watch import UNWATCHED, Watch, watched
from pipelines.worker import CheckpointRef, RowsHandle, forget_opened, opened_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamPlan:
    """What one stream does.

    `kafka`: the topic to read in place of the Delta log at log_path. `dead_letters_topic`: beside, or in place of, the
    table of dead letters. `start`: "resume" at the committed positions or
    the backfill's cut, or "earliest", the explicit choice to go without a backfill; for a topic also as
    kafka_topic.topic_positions says. `until`: "end", the log's end as of now, or "forever". `partitions`: these, a
    share of them, or None for all. `future_ms_max`: as models.event.parse_batch says.
    """

    log_path: Path
    checkpoint_path: Path
    store: RowsHandle
    dead_letters_path: Path
    kafka: KafkaLog | None = None
    dead_letters_topic: DeadLetterTopic | None = None
    start: Start = "resume"
    until: Literal["end", "forever"] = "end"
    partitions: tuple[int, ...] | Shard | None = None
    future_ms_max: int = FUTURE_MS_MAX
    row_cache_bytes: int = ROW_CACHE_BYTES
    batch_size: int = 10_000
    bundle_s: float = 2.0
    poll_s: float = 0.1

    @property
    def forgotten(self) -> ForgottenRef:
        """The list of forgotten users, beside the log's tables; the key is the one that this environment names."""
        return ForgottenRef(path=self.log_path.with_name(FORGOTTEN), key_file=chosen_key_file())

    @property
    def source_name(self) -> str:
        """What is read: the topic's name, or the log's path."""
        return str(self.log_path) if self.kafka is None else self.kafka.topic


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamReport:
    """What a stream did. records_read = dead letters met + folded + skipped + repeated + erased.

    seconds: with start-up and end; busy_s, busy_cpu_s: from the first record at hand to the last put, by the clock and
    of this process's CPU (0 where the workers are other processes).
    dead_letters: those new to the table; dead_letters_sent: those that their topic took, copies included;
    dead_letters_too_large: those that it refused for their size, which are in the table. row_bytes: what bytes_written
    would be, had every put written both parts of its row.
    """

    seconds: float
    busy_s: float = 0.0
    busy_cpu_s: float = 0.0
    records_read: int = 0
    dead_letters: int = 0
    dead_letters_sent: int = 0
    dead_letters_too_large: int = 0
    unknown_items: int = 0
    unknown_actions: int = 0
    events_folded: int = 0
    events_skipped: int = 0
    events_repeated: int = 0
    events_erased: int = 0
    conflicts: int = 0
    retries: int = 0
    rows_written: int = 0
    bytes_written: int = 0
    row_bytes: int = 0
    cache_hits: int = 0
    cache_misses: int = 0


def build(
    pipeline: beam.Pipeline,
    source: UnboundedSource,
    checkpoint: CheckpointRef,
    plan: StreamPlan,
    letters_held_s: float = 0.0,
) -> None:
    """Read, parse, encode, update; what is no event is kept aside.

    letters_held_s: how long dead letters may be gathered, by a caller who keeps the last of them afterwards.
    """
    parsed = (
        pipeline
        | "Read" >> ReadFromUnboundedSource(source, plan.poll_s, max_read_time_seconds=bundle_share_s(source, plan))
        | "Parse" >> beam.ParDo(ParseRecords(plan.future_ms_max)).with_outputs(LETTERS, main="events")
    )
    keep = KeepDeadLetters(
        plan.dead_letters_path, plan.dead_letters_topic, plan.source_name, letters_held_s, plan.forgotten
    )
    parsed[LETTERS] | "KeepDeadLetters" >> beam.ParDo(keep)
    (
        parsed["events"]
        | "Encode" >> beam.ParDo(EncodeEvents(checkpoint))
        | "Update" >> beam.ParDo(UpdateRows(checkpoint, plan.store, plan.row_cache_bytes, plan.forgotten))
    )


def run(plan: StreamPlan, pipeline_args: Sequence[str] = IN_PROCESS, watch: Watch = UNWATCHED) -> StreamReport:
    """Run the stream to its end; SIGTERM and SIGINT end it cleanly. pipeline_args are Beam's own options.

    Raises InputError, CheckpointError, StoreError or WireError: before anything runs where that can be known, else
    when the worker stopped, as run_job does. Either way the next start goes on where the committed positions are.
    """
    forget_opened()
    checkpoint = CheckpointRef(
        path=plan.checkpoint_path, checkpoint_id=open_checkpoint(plan.checkpoint_path).checkpoint_id
    )
    # Before anything is read: without the list or its key it would bring back who was forgotten.
    read_forgotten(plan.forgotten)
    source = resolve(plan, checkpoint.checkpoint_id)
    _check_dead_letters_topic(plan)
    log = structlog.get_logger()
    log.info("stream starts", log=plan.source_name, until=plan.until, slices=[_words(s) for s in source.slices])
    in_process = not any(each.startswith("--runner=") and each not in IN_PROCESS for each in pipeline_args)
    if not in_process:
        log.warning("figures are empty", reason="the runner's workers are other processes: look at the runner's own")
    prepare_runner()
    metrics = process_metrics()
    metrics.begin({part.partition: part.after_offset for part in source.slices})
    started_s = time.monotonic()
    pipeline = beam.Pipeline(options=PipelineOptions(list(pipeline_args)))
    # Workers of other processes are not asked when they end: each of their bundles keeps its own letters.
    build(pipeline, source, checkpoint, plan, HELD_S if in_process else 0.0)
    health = Health(metrics=metrics, store=plan.store, checkpoint_id=checkpoint.checkpoint_id, started_s=time.time())
    with watched(watch, health), drained_by_signals(watch.drain_s):
        counts = _counts(run_job(pipeline))
        last = LetterKeeper(
            plan.dead_letters_path, plan.dead_letters_topic, plan.source_name, plan.forgotten
        ).keep_held()
        if isinstance(source, KafkaSource):
            source.close()
    seconds, (busy_s, busy_cpu_s) = time.monotonic() - started_s, metrics.busy()
    counts |= {name: counts.get(name, 0) + more for name, more in asdict(last).items()}
    report = StreamReport(seconds=seconds, busy_s=busy_s, busy_cpu_s=busy_cpu_s, **counts)
    log.info("stream ended", **asdict(report))
    return report


def resolve(plan: StreamPlan, checkpoint_id: str) -> DeltaSource | KafkaSource:
    """The source with the position of every partition. Here, because Beam only logs what a source's split raises."""
    rows = opened_rows(plan.store)
    committed, backfill = rows.positions(checkpoint_id), rows.backfill(checkpoint_id)
    if plan.kafka is not None:
        topic = open_topic(plan.kafka)
        chosen = slices(topic, topic_positions(topic, committed, backfill, plan.start), plan.partitions, plan.until)
        # Last, so that a start which is refused for another reason names no log.
        bind_topic(rows, checkpoint_id, topic.epoch, topic.identity.topic_id, topic.identity.partitions)
        ledger = Ledger(store=plan.store, checkpoint_id=checkpoint_id, epoch=topic.epoch)
        return KafkaSource.of(topic, chosen, ledger, plan.batch_size)
    log = open_log(plan.log_path)
    if plan.start not in ("resume", "earliest"):
        raise InputError(f"a stream over {log.path} starts at resume or earliest, not at {plan.start}")
    if backfill is not None and backfill.epoch == log.epoch and backfill.log_id != log.log_id:
        raise StoreError(
            f"the rows come from another log of epoch {log.epoch}, {backfill.log}: its offsets do not compare with "
            f"those of {log.path}; ingest the new log with --epoch {log.epoch + 1}, and backfill"
        )
    return DeltaSource(
        path=plan.log_path,
        slices=slices(log, start_positions(log, committed, backfill, plan.start), plan.partitions, plan.until),
        ledger=Ledger(store=plan.store, checkpoint_id=checkpoint_id, epoch=log.epoch),
        batch_size=plan.batch_size,
    )


def _check_dead_letters_topic(plan: StreamPlan) -> None:
    to = plan.dead_letters_topic
    if to is None:
        return
    if plan.kafka is not None and to.topic == plan.kafka.topic:
        raise InputError(f"dead letters cannot go to {to.topic}, the topic that is read: name another one")
    open_topic(KafkaLog(kafka=to.kafka, topic=to.topic))


def bundle_share_s(source: DeltaSource | KafkaSource, plan: StreamPlan) -> float:
    """The in-process runner reads the partitions one after another within a bundle."""
    return plan.bundle_s / len(source.slices)


def _counts(result: PipelineResult) -> dict[str, int]:
    found = result.metrics().query(beam.metrics.MetricsFilter().with_namespace("vql"))["counters"]
    totals: dict[str, int] = {}
    for metric in found:
        name = metric.key.metric.name
        # A runner may know of a counter and have neither figure: Prism, of one that was never raised.
        totals[name] = totals.get(name, 0) + (metric.committed or metric.attempted or 0)
    return totals


def _words(part: Slice) -> str:
    return f"{part.partition}: {part.after_offset + 1}..{'' if part.until_offset is None else part.until_offset}"
