"""A topic of Kafka's, what an independent consumer finds in it, and whether a log is its copy."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import msgspec
from confluent_kafka import Consumer, TopicPartition
from deltalake import DeltaTable

from jobs.cli_ingest import topic_source
from jobs.ingest_kafka import ingest_topic
from jobs.topic_batches import TopicReport
from models.event import FUTURE_MS_MAX, RECORD_BYTES_MAX, Event
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog, open_topic
from tests.jobs.tiny import logged
from tests.kafka_broker import Broker
from tests.small import START_MS


def keyed(events: Sequence[Event]) -> list[tuple[str, bytes]]:
    return [(event.user_id, msgspec.json.encode(event)) for event in events]


def take_topic(spark, topic: str, log: Path, epoch: int = 1, **changes: object) -> TopicReport:
    """Ingest the topic up to its end. changes: those of its TopicSource."""
    return ingest_topic(spark, replace(topic_source(topic, epoch), **changes), log)


def held(broker: Broker, topic: str) -> dict[tuple[int, int], tuple[bytes | None, bytes | None, int]]:
    """What an independent consumer finds: key, value and timestamp by partition and offset."""
    settings = {"bootstrap.servers": broker.address, "group.id": uuid4().hex, "enable.partition.eof": True}
    consumer = Consumer(settings | {"isolation.level": "read_committed", "auto.offset.reset": "error"})
    opened = open_topic(KafkaLog(kafka=kafka_settings(), topic=topic))
    consumer.assign([TopicPartition(topic, p, begin) for p, begin in opened.begins.items()])
    found, ended = {}, set()
    while len(ended) < len(opened.ends):
        message = consumer.poll(10.0)
        assert message is not None
        if message.error() is not None:
            ended.add(message.partition())
            continue
        place = (message.partition(), message.offset())
        found[place] = (message.key(), message.value(), message.timestamp()[1])
    consumer.close()
    return found


def assert_log_is_topic(broker: Broker, topic: str, log: Path, epoch: int = 1) -> None:
    """By delta-rs, a second reader: every record of the topic, and no other, in events or in quarantine."""
    wanted = held(broker, topic)
    rows = [row for row in logged(log) if row["epoch"] == epoch]
    if DeltaTable.is_deltatable(str(log / "quarantine")):
        rows += [row for row in logged(log, "quarantine") if row["epoch"] == epoch]
    places = [(row["partition"], row["offset"]) for row in rows]
    assert len(places) == len(set(places)) == len(wanted)
    found = {place: (row["value"], row["log_time_ms"]) for place, row in zip(places, rows, strict=True)}
    assert found == {place: (value, time_ms) for place, (_, value, time_ms) in wanted.items()}


def bad_records() -> list[tuple[str | None, bytes | None, str]]:
    """Key, value and reason of records that are no events."""
    good = Event(event_id="e", user_id="u1", item_id="i1", action="view", event_time_ms=START_MS)
    late = msgspec.structs.replace(good, event_time_ms=int(time.time() * 1000) + 2 * FUTURE_MS_MAX)
    large = msgspec.json.encode(good)[:-1] + b',"more":"' + b"x" * RECORD_BYTES_MAX + b'"}'
    return [
        ("u1", b"\xff\x00 no text at all", "json"),
        ("u1", b"{}", "schema"),
        ("u2", msgspec.json.encode(good), "key"),
        ("u1", msgspec.json.encode(late), "future"),
        ("u1", large, "size"),
        ("", None, "key"),
    ]
