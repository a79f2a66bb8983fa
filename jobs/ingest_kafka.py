"""A Kafka topic to the log, exactly once: `vql ingest --from kafka`.

Spark plans a batch (which offsets) in its checkpoint before it is read, and after a kill plans the same batch again.
Delta takes a batch of one number from one application once, in each table. So whatever was killed when, `events` and
`quarantine` together hold every record of the topic, each at its own partition and offset and no other.

The checkpoint lies beside the tables, in _ingest/TOPIC/EPOCH-ID. Spark by itself goes on in a topic that was created
again, so the topic is looked at between the reading of each batch and its writing. Knows nothing of Kafka's clients:
whoever starts an ingest hands in how to look at the topic, and the options for Spark's own reader.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path

import deltalake
from delta.tables import DeltaTable
from pyspark.errors import StreamingQueryException
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.streaming import StreamingQuery

from jobs.event_log import create_log, log_facts
from jobs.spark import errors_of_workers
from jobs.topic_batches import BatchWriter, NotBegun, OpenedTopic, TopicReport, TopicSource, planned_ends
from models.errors import InputError
from models.event import UNKNOWN_TIME
from models.files import locked

SIGNAL_WAIT_S = 0.5
DATA_LOSS = ("KAFKA_DATA_LOSS", "Some data may have been lost")


@errors_of_workers()
def ingest_topic(spark: SparkSession, source: TopicSource, log: Path, continuous: bool = False) -> TopicReport:
    """Append what the topic holds beyond the log: up to its end as of now, or on and on until SIGTERM or SIGINT.

    Raises InputError for a topic that is not the one in the log, for records that the topic lost before they were
    ingested, and for a checkpoint that is behind the log.
    """
    opened = source.look()
    folder = log / "_ingest" / source.name
    with locked(folder):
        _prepare_log(spark, source, opened, log / "events")
        checkpoint = folder / f"{source.epoch}-{opened.identity.topic_id}"
        writer = BatchWriter(source=source, identity=opened.identity, log=log, checkpoint=checkpoint)
        _refuse_lost_checkpoint(checkpoint, log, writer.application)
        _refuse_lost_records(checkpoint, source.name, opened)
        started_s = time.monotonic()
        stream = _read_topic(spark, source, opened).writeStream.foreachBatch(writer.write)
        stream = stream.option("checkpointLocation", str(checkpoint)).queryName(f"ingest {source.name}")
        trigger = {"processingTime": f"{source.interval_s} seconds"} if continuous else {"availableNow": True}
        # A run to the end that a signal cut short must not look like a success.
        with _ended_by_signals(writer.stop) if continuous else nullcontext():
            _finish(stream.trigger(**trigger).start(), writer, source)
        return replace(writer.done, seconds=time.monotonic() - started_s)


def _prepare_log(spark: SparkSession, source: TopicSource, opened: OpenedTopic, events: Path) -> None:
    """The table as the copy of this topic in this epoch: made, found, or begun anew by a higher epoch."""
    wanted = {
        "vql.epoch": str(source.epoch),
        "vql.partitions": str(opened.identity.partitions),
        "vql.topic": source.name,
        "vql.topic_id": opened.identity.topic_id,
        "vql.dense": "false",
    }
    if not DeltaTable.isDeltaTable(spark, str(events)):
        create_log(spark, events, wanted)
    facts = log_facts(spark, events)
    if facts.topic_id is None:
        raise InputError(f"{events} was made from files; give --log another folder for topic {source.name}")
    same = (facts.topic_id, facts.partitions) == (opened.identity.topic_id, opened.identity.partitions)
    if same and facts.epoch == source.epoch:
        return
    if facts.epoch >= source.epoch:
        raise InputError(
            f"{events} holds epoch {facts.epoch} of the topic with id {facts.topic_id} and {facts.partitions} "
            f"partitions, not epoch {source.epoch} of {source.name} with id {opened.identity.topic_id} and "
            f"{opened.identity.partitions}; "
            + (
                f"give --epoch {facts.epoch}"
                if same
                else f"if it was created again or re-partitioned, give --epoch {facts.epoch + 1} and backfill"
            )
        )
    properties = ", ".join(f"'{name}' = '{value}'" for name, value in wanted.items())
    spark.sql(f"ALTER TABLE delta.`{events}` SET TBLPROPERTIES ({properties})")


def _refuse_lost_checkpoint(checkpoint: Path, log: Path, application: str) -> None:
    """Batches would be numbered from the start again, and Delta would take them for written."""
    planned = max((int(path.name) for path in (checkpoint / "offsets").glob("[0-9]*")), default=-1)
    for table in (log / "events", log / "quarantine"):
        if not deltalake.DeltaTable.is_deltatable(str(table)):
            continue
        written = deltalake.DeltaTable(table).transaction_version(application)
        if written is not None and written > planned:
            raise InputError(
                f"{table} holds batches up to {written}, but the checkpoint {checkpoint} ends at {planned}: restore "
                "that folder, or raise --epoch to ingest all that the topic still has anew"
            )


def _refuse_lost_records(checkpoint: Path, topic: str, opened: OpenedTopic) -> None:
    """Spark would notice as well, but does not say which records."""
    done = [int(path.name) for path in (checkpoint / "commits").glob("[0-9]*")]
    if not done:
        return
    for partition, offset in planned_ends(checkpoint, max(done), topic).items():
        if offset < opened.begins[partition]:
            what = f"partition {partition}: offset {offset} was next, and it begins at {opened.begins[partition]}"
            raise InputError(_lost(topic, what))


def _read_topic(spark: SparkSession, source: TopicSource, opened: OpenedTopic) -> DataFrame:
    partitions = list(range(opened.identity.partitions))
    reader = spark.readStream.format("kafka").options(**source.options)
    # Partitions are named: one that is added is not read before the epoch rises.
    reader = reader.option("assign", json.dumps({source.name: partitions})).option("startingOffsets", "earliest")
    reader = reader.option("failOnDataLoss", "true").option("kafka.isolation.level", "read_committed")
    rows = reader.option("maxOffsetsPerTrigger", source.batch_records).load()
    log_time = F.expr(f"nullif(unix_millis(timestamp), {UNKNOWN_TIME})").alias("log_time_ms")
    return rows.select("partition", "offset", log_time, "key", "value")


def _finish(query: StreamingQuery, writer: BatchWriter, source: TopicSource) -> None:
    try:
        while not query.awaitTermination(SIGNAL_WAIT_S):
            # A batch on its way is let finish, and the next one refuses to begin.
            if writer.stop.is_set() and not query.status["isTriggerActive"]:
                query.stop()
    except StreamingQueryException as error:
        if isinstance(writer.failure, NotBegun):
            return
        if any(words in str(error) for words in DATA_LOSS):
            raise InputError(_lost(source.name, "retention deleted records of a batch that was being read")) from error
        if writer.failure is not None:
            raise writer.failure from error
        raise
    finally:
        query.stop()


def _lost(topic: str, what: str) -> str:
    return (
        f"topic {topic} no longer has records that were not ingested yet ({what}); nothing was skipped: restore them, "
        "or accept the loss with a higher --epoch, which ingests all that the topic still has anew"
    )


@contextmanager
def _ended_by_signals(stop: threading.Event) -> Iterator[None]:
    """SIGTERM and SIGINT set the event; a second one has its usual effect."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def restore() -> None:
        for number, before in usual.items():
            signal.signal(number, before)

    def end(_number: int, _frame: object) -> None:
        stop.set()
        restore()

    for number in usual:
        signal.signal(number, end)
    try:
        yield
    finally:
        restore()
