"""What `vql ingest --from kafka` starts: the ingest in Spark, with how the stream's side looks at a topic."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from jobs.ingest_kafka import ingest_topic
from jobs.jars import kafka_source_jars
from jobs.spark import open_spark
from jobs.topic_batches import TopicReport, TopicSource
from models.event import FUTURE_MS_MAX
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog, open_topic


def ingest_from_kafka(source: TopicSource, log: Path, continuous: bool, master: str) -> TopicReport:
    """Ingest the topic. Raises InputError before Spark starts when it cannot be looked at."""
    source.look()
    return ingest_topic(open_spark(master, jars=kafka_source_jars()), source, log, continuous)


def topic_source(
    topic: str, epoch: int, batch_records: int = 500_000, future_ms_max: int = FUTURE_MS_MAX
) -> TopicSource:
    """The topic as the environment's settings reach it."""
    kafka = kafka_settings()
    options = {f"kafka.{name}": value for name, value in kafka.java_client().items()}
    look = partial(open_topic, KafkaLog(kafka=kafka, topic=topic, epoch=epoch))
    return TopicSource(
        name=topic,
        epoch=epoch,
        look=look,
        options=options,
        batch_records=batch_records,
        future_ms_max=future_ms_max,
    )
