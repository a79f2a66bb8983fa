"""A record of the topic is an event with its columns, or in quarantine with the reason; bytes and key are its own."""

from __future__ import annotations

from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from jobs.cli_ingest import topic_source
from models.errors import InputError
from models.event import Event
from tests.jobs.tiny import logged
from tests.jobs.topics import assert_log_is_topic, bad_records, keyed, take_topic
from tests.kafka_broker import Broker
from tests.small import START_MS, random_events

pytestmark = pytest.mark.spark


def test_an_event_has_its_columns_and_a_tombstone_its_user_alone(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    event = Event(event_id="e", user_id="ü1", item_id="i1", action="view", event_time_ms=START_MS, weight=-2.5)
    (place,) = broker.produce(topic, keyed([event]))
    (erased,) = broker.produce(topic, [("ü1", None)])

    take_topic(spark, topic, tmp_path / "log")

    rows = {(row["partition"], row["offset"]): row for row in logged(tmp_path / "log")}
    fields = msgspec.structs.asdict(event)
    assert {name: rows[place][name] for name in fields} == fields
    assert {name: rows[erased][name] for name in fields} == dict.fromkeys(fields) | {"user_id": "ü1"}
    assert rows[erased]["value"] is None
    assert rows[place]["epoch"] == rows[erased]["epoch"] == 1


def test_the_quarantine_says_why_and_keeps_key_and_bytes(spark, broker: Broker, topic: str, tmp_path: Path) -> None:
    bad = bad_records()
    places = broker.produce(topic, [(key, value) for key, value, _ in bad], partition=0)

    report = take_topic(spark, topic, tmp_path / "log")

    assert (report.events, report.quarantined) == (0, len(bad))
    rows = {(row["partition"], row["offset"]): row for row in logged(tmp_path / "log", "quarantine")}
    for place, (key, value, reason) in zip(places, bad, strict=True):
        row = rows[place]
        assert (row["reason"], row["value"], row["key"]) == (reason, value, (key or "").encode()), row
        assert row["detail"]


def test_a_topic_created_again_under_a_batch_is_not_written(spark, broker: Broker, topic: str, tmp_path: Path) -> None:
    broker.produce(topic, keyed(random_events(20)))
    other = broker.create_topic(f"other-{uuid4().hex}")
    looks = iter([topic_source(topic, 1).look, topic_source(other, 1).look])

    with pytest.raises(InputError, match="created again or re-partitioned while it was read"):
        take_topic(spark, topic, tmp_path / "log", look=lambda: next(looks)())
    assert logged(tmp_path / "log") == []

    assert take_topic(spark, topic, tmp_path / "log").records == 20
    assert_log_is_topic(broker, topic, tmp_path / "log")
