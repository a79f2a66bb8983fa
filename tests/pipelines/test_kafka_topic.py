from __future__ import annotations

import re
import time
from base64 import b64decode, urlsafe_b64decode
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from confluent_kafka.admin import AdminClient, NewPartitions

from feature_repo.store import Backfill
from models.errors import InputError, StoreError
from pipelines import kafka_topic
from pipelines.kafka_settings import KafkaSettings, kafka_settings
from pipelines.kafka_topic import (
    KafkaLog,
    Start,
    Topic,
    TopicIdentity,
    TopicWatch,
    describe,
    open_topic,
    topic_positions,
)
from tests.kafka_broker import PASSWORD, START_WAIT_S, USER, Broker

NOWHERE = kafka_settings(bootstrap_servers="127.0.0.1:1", timeout_s=0.5)
TOPIC = Topic(
    kafka=NOWHERE,
    identity=TopicIdentity(name="events", topic_id="x", partitions=3),
    epoch=2,
    begins={0: 10, 1: 0, 2: 0},
    ends={0: 100, 1: 50, 2: -1},
)


def backfill(cut: dict[int, int], epoch: int = 2) -> Backfill:
    return Backfill(epoch=epoch, cut=cut, users=1, events=1, log="log")


def settings(broker: Broker) -> KafkaSettings:
    return kafka_settings(bootstrap_servers=broker.address)


def test_a_stream_resumes_at_the_later_of_committed_position_and_cut() -> None:
    found = topic_positions(TOPIC, {0: (2, 95), 1: (2, 3)}, backfill({0: 90, 1: 50}), "resume")

    assert found == {0: 95, 1: 50, 2: -1}


@pytest.mark.parametrize(
    ("start", "wanted"),
    [
        ("earliest", {0: 9, 1: -1, 2: -1}),
        ("latest", {0: 100, 1: 50, 2: -1}),
        ({0: 10, 1: 51, 2: 0}, {0: 9, 1: 50, 2: -1}),
    ],
)
def test_where_nothing_is_known_it_starts_as_told(start: Start, wanted: dict[int, int]) -> None:
    assert topic_positions(TOPIC, {}, None, start) == wanted


@pytest.mark.parametrize("start", ["resume", {0: 10, 1: 0}])
def test_a_partition_of_which_nothing_is_known_or_told_is_refused(start: Start) -> None:
    with pytest.raises(StoreError, match="were never backfilled"):
        topic_positions(TOPIC, {}, None, start)


def test_latest_and_a_few_offsets_leave_what_is_known_as_it_is() -> None:
    known = {0: (2, 95), 1: (2, 3)}

    assert topic_positions(TOPIC, known, None, "latest") == {0: 95, 1: 3, 2: -1}
    assert topic_positions(TOPIC, known, None, {1: 0, 2: 0}) == {0: 95, 1: -1, 2: -1}


def test_a_start_that_would_leave_a_hole_is_refused() -> None:
    with pytest.raises(StoreError, match="rows hold partition 1 up to offset 3; a start at 5 would leave a hole"):
        topic_positions(TOPIC, {1: (2, 3)}, backfill({0: 20}), {1: 5})

    assert topic_positions(TOPIC, {1: (2, 3)}, backfill({0: 20}), {1: 4})[1] == 3


@pytest.mark.parametrize("start", ["resume", "earliest", "latest"])
def test_records_that_retention_took_before_they_were_folded_stop_everything(start: Start) -> None:
    with pytest.raises(InputError, match=r"partition 0: offset 9 is out of range; it begins at 10.*vql backfill"):
        topic_positions(TOPIC, {0: (2, 8), 1: (2, 0), 2: (2, -1)}, None, start)

    assert topic_positions(TOPIC, {0: (2, 9), 1: (2, 0), 2: (2, -1)}, None, start)[0] == 9


@pytest.mark.parametrize(("told", "said"), [({3: 0}, "no partition 3"), ({0: 9}, "10 to 101"), ({0: 102}, "10 to 101")])
def test_a_start_outside_the_topic_is_refused(told: dict[int, int], said: str) -> None:
    with pytest.raises(InputError, match=said):
        topic_positions(TOPIC, {}, backfill({0: 100, 1: 50}), told)


def test_another_epoch_and_a_topic_shorter_than_the_rows_are_refused() -> None:
    with pytest.raises(StoreError, match="of epoch 1"):
        topic_positions(TOPIC, {}, backfill({0: 20}, epoch=1), "earliest")
    with pytest.raises(StoreError, match=r"up to offset 101, but kafka://127\.0\.0\.1:1/events ends at 100"):
        topic_positions(TOPIC, {}, backfill({0: 101}), "resume")


def test_a_cluster_that_does_not_answer_is_named_within_the_time_out() -> None:
    started_s = time.monotonic()

    with pytest.raises(InputError, match=r"Kafka at 127\.0\.0\.1:1 cannot be used .*refused.*waited 0\.5 s"):
        open_topic(KafkaLog(kafka=NOWHERE, topic="events"))

    assert time.monotonic() - started_s < 3


@pytest.mark.beam
def test_an_opened_topic_knows_which_it_is_and_what_it_holds(broker: Broker, topic: str) -> None:
    broker.produce(topic, [("k", b"v")] * 7, partition=1)

    opened = open_topic(KafkaLog(kafka=settings(broker), topic=topic, epoch=4))

    assert (opened.epoch, opened.begins, opened.ends) == (4, {0: 0, 1: 0}, {0: -1, 1: 6})
    assert (opened.identity.name, opened.identity.partitions) == (topic, 2)
    assert opened == open_topic(KafkaLog(kafka=settings(broker), topic=topic, epoch=4))


@pytest.mark.beam
def test_a_topic_id_can_name_a_folder(broker: Broker) -> None:
    admin, ids = AdminClient(settings(broker).client()), {}
    for n in range(20):
        topic = broker.create_topic(f"named-{n}-{uuid4().hex}")
        given = describe(admin, topic, START_WAIT_S).result().topic_id
        ids[str(given)] = open_topic(KafkaLog(kafka=settings(broker), topic=topic)).identity.topic_id

    assert any(set("+/") & set(given) for given in ids)
    for given, spelled in ids.items():
        assert urlsafe_b64decode(f"{spelled}==") == b64decode(f"{given}==")
        assert not set("+/") & set(spelled)


@pytest.mark.beam
def test_an_unknown_topic_is_named(broker: Broker) -> None:
    with pytest.raises(InputError, match=rf"Kafka at {broker.address} has no such topic"):
        open_topic(KafkaLog(kafka=settings(broker), topic="nowhere"))


@pytest.mark.beam
def test_a_secured_cluster_is_read_with_the_password_and_certificate_of_the_files(
    broker: Broker, topic: str, tmp_path: Path
) -> None:
    broker.produce(topic, [("k", b"v")] * 3, partition=0)
    secure = secured(broker, tmp_path, PASSWORD)

    assert open_topic(KafkaLog(kafka=secure, topic=topic)).ends == {0: 2, 1: -1}


@pytest.mark.beam
def test_a_wrong_password_or_certificate_is_said(broker: Broker, topic: str, tmp_path: Path) -> None:
    wrong = secured(broker, tmp_path, "guessed")
    with pytest.raises(InputError, match=r"(?i)authentication failed") as caught:
        open_topic(KafkaLog(kafka=wrong, topic=topic))
    assert "guessed" not in str(caught.value)

    with pytest.raises(InputError, match=r"(?i)certificate"):
        open_topic(KafkaLog(kafka=wrong.model_copy(update={"ssl_ca_file": None}), topic=topic))


@pytest.mark.beam
def test_a_topic_created_again_is_another_topic(broker: Broker, topic: str) -> None:
    before = open_topic(KafkaLog(kafka=settings(broker), topic=topic)).identity
    broker.delete_topic(topic)
    broker.create_topic(topic)
    after = open_topic(KafkaLog(kafka=settings(broker), topic=topic)).identity

    with pytest.raises(StoreError, match=rf"{topic} is not .* id {re.escape(after.topic_id)} and .*raise the epoch"):
        before.refuse_another(after)
    before.refuse_another(replace(before))


@pytest.mark.beam
def test_a_watch_tells_when_a_topic_is_deleted_or_created_again_or_gets_partitions(
    broker: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_topic, "WATCH_INTERVAL_S", 0.01)
    watch = TopicWatch(settings(broker), open_topic(KafkaLog(kafka=settings(broker), topic=topic)).identity)

    assert told_by(watch, 0.3) is None
    broker.delete_topic(topic)
    assert f"{topic} was deleted while it was read" in str(told_by(watch))
    broker.create_topic(topic)
    assert "created again or re-partitioned" in str(told_by(watch))

    watch = TopicWatch(settings(broker), open_topic(KafkaLog(kafka=settings(broker), topic=topic)).identity)
    assert told_by(watch, 0.3) is None
    admin = broker.admin()
    admin.create_partitions([NewPartitions(topic, 3)])[topic].result(START_WAIT_S)
    assert "3 partitions, theirs had" in str(told_by(watch))


def test_a_watch_over_a_cluster_that_does_not_answer_says_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kafka_topic, "WATCH_INTERVAL_S", 0.01)

    assert told_by(TopicWatch(NOWHERE, TOPIC.identity), 1.2) is None


def secured(broker: Broker, folder: Path, password: str) -> KafkaSettings:
    (folder / "password").write_text(password)
    return kafka_settings(
        bootstrap_servers=broker.secure_address,
        security_protocol="SASL_SSL",
        sasl_mechanism="PLAIN",
        sasl_username=USER,
        sasl_password_file=folder / "password",
        ssl_ca_file=broker.ca,
        timeout_s=2,
    )


def told_by(watch: TopicWatch, wait_s: float = 10.0) -> Exception | None:
    """What the watch raises within the time."""
    return _first_error(watch.check, time.monotonic() + wait_s)


def _first_error(call: Callable[[], None], until_s: float) -> Exception | None:
    while time.monotonic() < until_s:
        try:
            call()
        except (InputError, StoreError) as error:
            return error
        time.sleep(0.01)
    return None
