"""The log is the topic: every record once, at its own partition and offset, whatever was killed on the way."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from confluent_kafka import Producer, TopicPartition
from deltalake import DeltaTable

from jobs.cli_ingest import topic_source
from jobs.topic_batches import OpenedTopic
from models.errors import InputError
from tests.jobs.commands import assert_one_line
from tests.jobs.processes import kill, kill_when, start
from tests.jobs.tiny import logged, take
from tests.jobs.topics import assert_log_is_topic, bad_records, held, keyed, take_topic
from tests.kafka_broker import PASSWORD, USER, Broker
from tests.small import random_events

WAIT_S = 600.0
MANY = 2_000
pytestmark = pytest.mark.spark


def test_the_log_is_the_topic_and_the_next_run_adds_only_what_is_new(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    events, bad = random_events(300), bad_records()
    broker.produce(topic, keyed(events[:200]) + [(key, value) for key, value, _ in bad] + [("u3", None)])

    first = take_topic(spark, topic, tmp_path / "log", batch_records=50)

    assert (first.records, first.events, first.quarantined) == (207, 201, 6)
    assert_log_is_topic(broker, topic, tmp_path / "log")
    assert DeltaTable(tmp_path / "log" / "events").version() > 3, "one batch would prove little"

    broker.produce(topic, keyed(events[200:]))
    second = take_topic(spark, topic, tmp_path / "log")

    assert (second.records, second.events, second.quarantined) == (100, 100, 0)
    assert_log_is_topic(broker, topic, tmp_path / "log")
    assert take_topic(spark, topic, tmp_path / "log").records == 0


def test_offsets_that_a_transaction_left_empty_are_no_loss(spark, broker: Broker, topic: str, tmp_path: Path) -> None:
    producer = Producer({"bootstrap.servers": broker.address, "transactional.id": uuid4().hex})
    producer.init_transactions()
    for n, (key, value) in enumerate(keyed(random_events(40))):
        if n % 10 == 0:
            producer.begin_transaction()
        producer.produce(topic, key=key, value=value, partition=0)
        if n % 10 == 9:
            (producer.abort_transaction if n == 19 else producer.commit_transaction)()

    report = take_topic(spark, topic, tmp_path / "log")

    assert report.records == 30
    assert_log_is_topic(broker, topic, tmp_path / "log")
    offsets = sorted(row["offset"] for row in logged(tmp_path / "log"))
    assert offsets != list(range(30))


def test_a_topic_created_again_is_refused_until_the_epoch_rises(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    log, events = tmp_path / "log", random_events(60)
    broker.produce(topic, keyed(events[:20]))
    take_topic(spark, topic, log)
    before = logged(log)
    broker.delete_topic(topic)
    created_again(broker, topic, partitions=3)
    broker.produce(topic, keyed(events))

    with pytest.raises(InputError, match=r"created again or re-partitioned, give --epoch 2 and backfill"):
        take_topic(spark, topic, log)
    assert logged(log) == before

    assert take_topic(spark, topic, log, epoch=2).records == 60
    assert_log_is_topic(broker, topic, log, epoch=2)
    assert [row for row in logged(log) if row["epoch"] == 1] == before
    with pytest.raises(InputError, match=r"give --epoch 2$"):
        take_topic(spark, topic, log, epoch=1)


def created_again(broker: Broker, topic: str, partitions: int) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while True:
        try:
            broker.create_topic(topic, partitions)
            return
        except Exception as error:
            if "TOPIC_ALREADY_EXISTS" not in str(error) or time.monotonic() > deadline_s:
                raise
            time.sleep(0.1)


def test_records_that_retention_deleted_before_they_were_ingested_are_a_hard_stop(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    events = keyed(random_events(60))
    broker.produce(topic, events[:20], partition=0)
    take_topic(spark, topic, tmp_path / "log")
    broker.produce(topic, events[20:], partition=0)
    admin = broker.admin()
    admin.delete_records([TopicPartition(topic, 0, 40)])[TopicPartition(topic, 0, 40)].result(WAIT_S)

    with pytest.raises(InputError, match="no longer has records that were not ingested yet") as refusal:
        take_topic(spark, topic, tmp_path / "log")
    assert "\n" not in str(refusal.value)
    assert "nothing was skipped" in str(refusal.value)
    assert len(logged(tmp_path / "log")) == 20

    assert take_topic(spark, topic, tmp_path / "log", epoch=2).records == 20
    assert_log_is_topic(broker, topic, tmp_path / "log", epoch=2)


def test_records_that_go_while_a_batch_is_read_are_a_hard_stop(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    broker.produce(topic, keyed(random_events(60)), partition=0)
    real, admin = topic_source(topic, 1).look, broker.admin()
    take_topic(spark, topic, tmp_path / "log", batch_records=10)
    broker.produce(topic, keyed(random_events(60)), partition=0)
    admin.delete_records([TopicPartition(topic, 0, 60)])[TopicPartition(topic, 0, 60)].result(WAIT_S)

    def look_then_delete() -> OpenedTopic:
        opened = real()
        admin.delete_records([TopicPartition(topic, 0, 100)])[TopicPartition(topic, 0, 100)].result(WAIT_S)
        return opened

    with pytest.raises(InputError, match="no longer has records that were not ingested yet"):
        take_topic(spark, topic, tmp_path / "log", look=look_then_delete)
    assert len(logged(tmp_path / "log")) == 60


def test_a_lost_checkpoint_is_noticed_before_batches_are_taken_for_written(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    broker.produce(topic, keyed(random_events(20)))
    take_topic(spark, topic, tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "_ingest")
    broker.produce(topic, keyed(random_events(20, seed=1)))

    with pytest.raises(InputError, match=r"batches up to 0, but the checkpoint .* ends at -1: restore that folder"):
        take_topic(spark, topic, tmp_path / "log")
    assert len(logged(tmp_path / "log")) == 20


def test_files_and_topics_do_not_mix(spark, broker: Broker, topic: str, tmp_path: Path) -> None:
    rows = [msgspec.structs.asdict(event) for event in random_events(5)]
    take(spark, rows, tmp_path / "files")
    broker.produce(topic, keyed(random_events(5)))
    take_topic(spark, topic, tmp_path / "topic")

    with pytest.raises(InputError, match="was made from files; give --log another folder"):
        take_topic(spark, topic, tmp_path / "files")
    with pytest.raises(InputError, match="is the copy of a Kafka topic; give --log another folder"):
        take(spark, rows, tmp_path / "topic")


def test_the_command_ingests_a_topic(spark, vql, broker: Broker, topic: str, tmp_path: Path) -> None:
    broker.produce(topic, [*keyed(random_events(20)), ("u1", b"{}")])

    said = vql("ingest", "--from", "kafka", "--topic", topic, "--log", tmp_path / "log")

    assert said.code == 0, said
    assert "21 records read: 20 appended, 1 quarantined" in said.out
    assert_log_is_topic(broker, topic, tmp_path / "log")


def test_a_secured_cluster_is_read_with_the_password_and_certificate_of_the_files(
    spark, broker: Broker, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker.produce(topic, keyed(random_events(20)))
    (tmp_path / "password").write_text(PASSWORD)
    settings = {"SECURITY_PROTOCOL": "SASL_SSL", "SASL_MECHANISM": "PLAIN", "SASL_USERNAME": USER}
    files = {"SASL_PASSWORD_FILE": tmp_path / "password", "SSL_CA_FILE": broker.ca}
    for name, value in (settings | files | {"BOOTSTRAP_SERVERS": broker.secure_address}).items():
        monkeypatch.setenv(f"VQL_KAFKA_{name}", str(value))

    assert take_topic(spark, topic, tmp_path / "log").records == 20

    assert PASSWORD not in str(topic_source(topic, 1).options)
    checkpoint = [path for path in (tmp_path / "log" / "_ingest").rglob("*") if path.is_file()]
    assert checkpoint
    assert not any(PASSWORD.encode() in path.read_bytes() for path in checkpoint)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "kafka"], "--from kafka reads a topic: give --topic"),
        (["--from", "kafka", "--topic", "t", "--input", "x.csv"], "no --input"),
        (["--from", "pulsar"], "'pulsar' is none of files, kafka"),
        ([], "--from files reads a file: give --input"),
        (["--input", "x.csv", "--topic", "t"], "neither --topic nor --continuous"),
        (["--from", "kafka", "--topic", "nowhere"], "has no such topic"),
    ],
)
def test_a_command_that_says_too_little_is_refused(
    vql, topic: str, tmp_path: Path, arguments: list[str], words: str
) -> None:
    said = vql("ingest", "--log", tmp_path / "log", *arguments)
    assert_one_line(said, 2, words)
    assert not (tmp_path / "log").exists()


def moments(log: Path, topic: str) -> dict[str, Callable[[], int]]:
    """What an ingest adds to on its way through a batch; it is killed as soon as there is more of it."""
    checkpoint = log / "_ingest" / topic
    return {
        "batches planned": lambda: len(list(checkpoint.glob("*/offsets/[0-9]*"))),
        "quarantine written": lambda: len(list(log.glob("quarantine/_delta_log/*.json"))),
        "files of events": lambda: len(list(log.glob("events/partition=*/*.parquet"))),
        "events written": lambda: len(list(log.glob("events/_delta_log/*.json"))),
        "batches done": lambda: len(list(checkpoint.glob("*/commits/[0-9]*"))),
    }


@pytest.mark.slow
@pytest.mark.timeout(1800)  # six starts of Spark
def test_killed_again_and_again_at_any_moment_the_log_is_still_the_topic(
    broker: Broker, topic: str, tmp_path: Path
) -> None:
    events, log = keyed(random_events(MANY)), tmp_path / "log"
    command = ["ingest", "--from", "kafka", "--topic", topic, "--log", log, "--continuous", "--batch-records", 400]
    rounds = list(moments(log, topic).items())
    for n, (moment, count) in enumerate(rounds):
        broker.produce(topic, [*events[n :: len(rounds)], ("u1", moment.encode())])
        before = count()
        kill_when(start(command, tmp_path), lambda count=count, before=before: count() > before)

    process, wanted, deadline_s = start(command, tmp_path), len(held(broker, topic)), time.monotonic() + WAIT_S
    try:
        while rows_of(log) < wanted:
            assert process.poll() is None
            assert time.monotonic() < deadline_s, f"{rows_of(log)} of {wanted} after {WAIT_S} s"
            time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 0
    finally:
        kill(process)
    assert_log_is_topic(broker, topic, log)


def rows_of(log: Path) -> int:
    return sum(DeltaTable(log / name).count() for name in ("events", "quarantine"))
