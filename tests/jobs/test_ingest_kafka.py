"""The log is the topic: every record once, at its own partition and offset, whatever was killed on the way."""

from __future__ import annotations

import shutil
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from deltalake import DeltaTable

from feature_repo.handle import StoreHandle
from feature_repo.reader import Reader
from jobs.backfill import backfill
from jobs.cli_ingest import topic_source
from jobs.event_log import read_events
from jobs.ingest_kafka import ingest_topic
from jobs.parity import compare_rows
from jobs.topic_batches import OpenedTopic, TopicReport
from models.checkpoint import Checkpoint
from models.errors import EventError, InputError
from models.event import FUTURE_MS_MAX, RECORD_BYTES_MAX, Event, parse, tombstone
from models.row import Row, advance, new_row
from models.wire import Stamp
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog, open_topic
from pipelines.stream import StreamPlan
from pipelines.stream import run as stream
from tests.jobs.commands import assert_one_line
from tests.jobs.processes import kill, kill_when, start
from tests.jobs.tiny import logged, take
from tests.kafka_broker import Broker
from tests.pipelines.small_log import assert_rows_equal, read_rows, recent_of
from tests.small import START_MS, random_events, small_checkpoint

pytestmark = pytest.mark.spark

WAIT_S = 400.0
MANY = 6_000


@pytest.fixture(autouse=True)
def _settings(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VQL_KAFKA_BOOTSTRAP_SERVERS", broker.address)


def keyed(events: Sequence[Event]) -> list[tuple[str, bytes]]:
    return [(event.user_id, msgspec.json.encode(event)) for event in events]


def run(spark, topic: str, log: Path, epoch: int = 1, **changes: object) -> TopicReport:
    source = topic_source(topic, epoch)
    for name, value in changes.items():
        object.__setattr__(source, name, value)
    return ingest_topic(spark, source, log)


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


def test_the_log_is_the_topic_and_the_next_run_adds_only_what_is_new(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    events, bad = random_events(300), bad_records()
    broker.produce(topic, keyed(events[:200]) + [(key, value) for key, value, _ in bad] + [("u3", None)])

    first = run(spark, topic, tmp_path / "log", batch_records=50)

    assert (first.records, first.events, first.quarantined) == (207, 201, 6)
    assert_log_is_topic(broker, topic, tmp_path / "log")
    assert DeltaTable(tmp_path / "log" / "events").version() > 3, "one batch would prove little"

    broker.produce(topic, keyed(events[200:]))
    second = run(spark, topic, tmp_path / "log")

    assert (second.records, second.events, second.quarantined) == (100, 100, 0)
    assert_log_is_topic(broker, topic, tmp_path / "log")
    assert run(spark, topic, tmp_path / "log").records == 0


def test_an_event_has_its_columns_and_a_tombstone_its_user_alone(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    event = Event(event_id="e", user_id="ü1", item_id="i1", action="view", event_time_ms=START_MS, weight=-2.5)
    (place,) = broker.produce(topic, keyed([event]))
    (erased,) = broker.produce(topic, [("ü1", None)])

    run(spark, topic, tmp_path / "log")

    rows = {(row["partition"], row["offset"]): row for row in logged(tmp_path / "log")}
    fields = msgspec.structs.asdict(event)
    assert {name: rows[place][name] for name in fields} == fields
    assert {name: rows[erased][name] for name in fields} == dict.fromkeys(fields) | {"user_id": "ü1"}
    assert rows[erased]["value"] is None
    assert rows[place]["epoch"] == rows[erased]["epoch"] == 1


def test_the_quarantine_says_why_and_keeps_key_and_bytes(spark, broker: Broker, topic: str, tmp_path: Path) -> None:
    bad = bad_records()
    places = broker.produce(topic, [(key, value) for key, value, _ in bad], partition=0)

    report = run(spark, topic, tmp_path / "log")

    assert (report.events, report.quarantined) == (0, len(bad))
    rows = {(row["partition"], row["offset"]): row for row in logged(tmp_path / "log", "quarantine")}
    for place, (key, value, reason) in zip(places, bad, strict=True):
        row = rows[place]
        assert (row["reason"], row["value"], row["key"]) == (reason, value, (key or "").encode()), row
        assert row["detail"]


def test_offsets_that_a_transaction_left_empty_are_no_loss(spark, broker: Broker, topic: str, tmp_path: Path) -> None:
    producer = Producer({"bootstrap.servers": broker.address, "transactional.id": uuid4().hex})
    producer.init_transactions()
    for n, (key, value) in enumerate(keyed(random_events(40))):
        if n % 10 == 0:
            producer.begin_transaction()
        producer.produce(topic, key=key, value=value, partition=0)
        if n % 10 == 9:
            (producer.abort_transaction if n == 19 else producer.commit_transaction)()

    report = run(spark, topic, tmp_path / "log")

    assert report.records == 30
    assert_log_is_topic(broker, topic, tmp_path / "log")
    offsets = sorted(row["offset"] for row in logged(tmp_path / "log"))
    assert offsets != list(range(30))


def test_a_topic_created_again_is_refused_until_the_epoch_rises(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    log, events = tmp_path / "log", random_events(60)
    broker.produce(topic, keyed(events[:20]))
    run(spark, topic, log)
    before = logged(log)
    broker.delete_topic(topic)
    created_again(broker, topic, partitions=3)
    broker.produce(topic, keyed(events))

    with pytest.raises(InputError, match=r"created again or re-partitioned, give --epoch 2 and backfill"):
        run(spark, topic, log)
    assert logged(log) == before

    assert run(spark, topic, log, epoch=2).records == 60
    assert_log_is_topic(broker, topic, log, epoch=2)
    assert [row for row in logged(log) if row["epoch"] == 1] == before
    with pytest.raises(InputError, match=r"give --epoch 2$"):
        run(spark, topic, log, epoch=1)


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


def test_a_topic_created_again_under_a_batch_is_not_written(spark, broker: Broker, topic: str, tmp_path: Path) -> None:
    broker.produce(topic, keyed(random_events(20)))
    other = broker.create_topic(f"other-{uuid4().hex}")
    looks = iter([topic_source(topic, 1).look, topic_source(other, 1).look])

    with pytest.raises(InputError, match="created again or re-partitioned while it was read"):
        run(spark, topic, tmp_path / "log", look=lambda: next(looks)())
    assert logged(tmp_path / "log") == []

    assert run(spark, topic, tmp_path / "log").records == 20
    assert_log_is_topic(broker, topic, tmp_path / "log")


def test_records_that_retention_deleted_before_they_were_ingested_are_a_hard_stop(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    events = keyed(random_events(60))
    broker.produce(topic, events[:20], partition=0)
    run(spark, topic, tmp_path / "log")
    broker.produce(topic, events[20:], partition=0)
    admin = broker.admin()
    admin.delete_records([TopicPartition(topic, 0, 40)])[TopicPartition(topic, 0, 40)].result(WAIT_S)

    with pytest.raises(InputError, match="no longer has records that were not ingested yet") as refusal:
        run(spark, topic, tmp_path / "log")
    assert "\n" not in str(refusal.value)
    assert "nothing was skipped" in str(refusal.value)
    assert len(logged(tmp_path / "log")) == 20

    assert run(spark, topic, tmp_path / "log", epoch=2).records == 20
    assert_log_is_topic(broker, topic, tmp_path / "log", epoch=2)


def test_a_lost_checkpoint_is_noticed_before_batches_are_taken_for_written(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    broker.produce(topic, keyed(random_events(20)))
    run(spark, topic, tmp_path / "log")
    shutil.rmtree(tmp_path / "log" / "_ingest")
    broker.produce(topic, keyed(random_events(20, seed=1)))

    with pytest.raises(InputError, match=r"batches up to 0, but the checkpoint .* ends at -1: restore that folder"):
        run(spark, topic, tmp_path / "log")
    assert len(logged(tmp_path / "log")) == 20


def test_files_and_topics_do_not_mix(spark, broker: Broker, topic: str, tmp_path: Path) -> None:
    rows = [msgspec.structs.asdict(event) for event in random_events(5)]
    take(spark, rows, tmp_path / "files")
    broker.produce(topic, keyed(random_events(5)))
    run(spark, topic, tmp_path / "topic")

    with pytest.raises(InputError, match="was made from files; give --log another folder"):
        run(spark, topic, tmp_path / "files")
    with pytest.raises(InputError, match="is the copy of a Kafka topic; give --log another folder"):
        take(spark, rows, tmp_path / "topic")


def test_the_command_ingests_a_topic(spark, vql, broker: Broker, topic: str, tmp_path: Path) -> None:
    broker.produce(topic, [*keyed(random_events(20)), ("u1", b"{}")])

    said = vql("ingest", "--from", "kafka", "--topic", topic, "--log", tmp_path / "log")

    assert said.code == 0, said
    assert "21 records read: 20 appended, 1 quarantined" in said.out
    assert_log_is_topic(broker, topic, tmp_path / "log")


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
def test_a_command_that_says_too_little_is_refused(vql, tmp_path: Path, arguments: list[str], words: str) -> None:
    said = vql("ingest", "--log", tmp_path / "log", *arguments)
    assert_one_line(said, 2, words)
    assert not (tmp_path / "log").exists()


def moments(log: Path, topic: str) -> dict[str, Callable[[], bool]]:
    """Where an ingest is killed: what must be there already, of its second batch or later."""
    checkpoint = log / "_ingest" / topic
    return {
        "planned": lambda: any(checkpoint.glob("*/offsets/2")),
        "quarantine written": lambda: commits(log / "quarantine") >= 2,
        "files written": lambda: len(list((log / "events").glob("partition=*/*.parquet"))) >= 5,
        "events written": lambda: commits(log / "events") >= 4,
        "committed": lambda: any(checkpoint.glob("*/commits/3")),
    }


def commits(table: Path) -> int:
    return len(list((table / "_delta_log").glob("*.json")))


@pytest.mark.slow
def test_killed_again_and_again_at_any_moment_the_log_is_still_the_topic(
    broker: Broker, topic: str, tmp_path: Path
) -> None:
    events, log = random_events(MANY), tmp_path / "log"
    broker.produce(topic, keyed(events[: MANY // 2]))
    broker.produce(topic, [("u1", b"{}")] * 50)
    command = ["ingest", "--from", "kafka", "--topic", topic, "--log", log, "--continuous", "--batch-records", 500]

    for moment, reached in moments(log, topic).items():
        kill_when(start(command, tmp_path), reached)
        broker.produce(topic, [*keyed(events[MANY // 2 :][:: len(moments(log, topic))]), ("u1", moment.encode())])

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


def records_with_tombstones(events: Sequence[Event]) -> list[tuple[str, bytes | None]]:
    """The events, with a tombstone of some user every 70 records and one of a user who never comes back."""
    records: list[tuple[str, bytes | None]] = [
        ("gone", msgspec.json.encode(msgspec.structs.replace(events[0], user_id="gone")))
    ]
    for n, record in enumerate(keyed(events)):
        records.append(record)
        if n % 70 == 69:
            records.append((events[n - 3].user_id, None))
    return [*records, ("gone", None)]


def plain_rows(checkpoint: Checkpoint, records: Mapping[tuple[int, int], tuple], epoch: int = 1) -> dict[str, Row]:
    """Each user's row by a plain fold over the topic, with the bad ones left out."""
    using, mine = checkpoint.fold(), {}
    for (partition, offset), (key, value, _) in sorted(records.items()):
        try:
            event = tombstone(key) if value is None else parse(value)
        except EventError:
            continue
        mine.setdefault((event.user_id, partition), []).append((event, offset))
    rows = {}
    for (user_id, partition), taken in mine.items():
        recent = recent_of(checkpoint, [event for event, _ in taken], [offset for _, offset in taken])
        position = Stamp(epoch=epoch, partition=partition, offset=-1)
        rows[user_id], _ = advance(new_row(using.spec, epoch, partition), recent, position, using)
    return rows


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def plan(checkpoint: Checkpoint, topic: str, tmp_path: Path) -> StreamPlan:
    (tmp_path / "state").mkdir()
    return StreamPlan(
        log_path=tmp_path / "log" / "events",
        checkpoint_path=checkpoint.path,
        store=StoreHandle(state=tmp_path / "state"),
        dead_letters_path=tmp_path / "dead_letters",
        kafka=KafkaLog(kafka=kafka_settings(), topic=topic),
    )


def test_backfill_and_stream_join_at_the_cut_without_gap_or_overlap(
    spark, broker: Broker, topic: str, tmp_path: Path, checkpoint: Checkpoint, plan: StreamPlan
) -> None:
    records = records_with_tombstones(random_events(900, users=20))
    bad = [("u1", b"{}"), ("u2", b"{}"), ("u3", b"no json"), ("u4", b"")]
    cut = len(records) * 2 // 3
    broker.produce(topic, [*records[:cut], *bad])
    run(spark, topic, tmp_path / "log", batch_records=100)
    users = [f"u{n}" for n in range(20)] + ["gone"]

    done = backfill(spark, checkpoint, tmp_path / "log", plan.store)

    assert done.events == cut
    assert_rows_equal(read_rows(plan.store.open(), checkpoint, users), plain_rows(checkpoint, held(broker, topic)))
    broker.produce(topic, records[cut:])
    report = stream(plan)
    # Skipped are those that a later tombstone of the same batch erases.
    assert report.events_folded + report.events_skipped == len(records) - cut
    assert report.dead_letters == len(bad)
    assert_rows_equal(read_rows(plan.store.open(), checkpoint, users), plain_rows(checkpoint, held(broker, topic)))
    assert read_rows(plan.store.open(), checkpoint, ["gone"])["gone"].count == 0

    # The same from the log's own table: all of it is in the rows already.
    run(spark, topic, tmp_path / "log")
    again = stream(replace(plan, kafka=None, start="earliest"))
    assert (again.events_folded, again.events_skipped, again.dead_letters) == (0, len(records), 0)


def test_the_copy_replayed_gives_the_rows_of_the_topic(
    spark, broker: Broker, topic: str, tmp_path: Path, checkpoint: Checkpoint, plan: StreamPlan
) -> None:
    broker.produce(topic, [("u1", b"{}"), *records_with_tombstones(random_events(400)), ("u1", b"{}")])
    run(spark, topic, tmp_path / "log")

    stream(replace(plan, kafka=None, start="earliest", batch_size=30))

    wanted = plain_rows(checkpoint, held(broker, topic))
    assert_rows_equal(read_rows(plan.store.open(), checkpoint, list(wanted)), wanted)


def test_rows_of_a_copy_agree_with_the_independent_check(
    spark, broker: Broker, topic: str, tmp_path: Path, checkpoint: Checkpoint, plan: StreamPlan
) -> None:
    broker.produce(topic, records_with_tombstones(random_events(300)))
    run(spark, topic, tmp_path / "log")
    backfill(spark, checkpoint, tmp_path / "log", plan.store)

    parity = compare_rows(Reader(plan.store.open(), checkpoint, checkpoint.fold()), tmp_path / "log")

    assert parity.conserved
    assert parity.users == 8
    assert parity.row_events < 300, "nothing was erased"
    assert parity.max_abs_error < 1e-4


def test_training_sees_nothing_from_before_a_tombstone_or_of_an_older_epoch(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    events = [
        Event(event_id=f"e{n}", user_id=f"u{n % 2}", item_id=f"i{n}", action="view", event_time_ms=START_MS + n)
        for n in range(10)
    ]
    broker.produce(topic, [*keyed(events[:6]), ("u0", None), *keyed(events[6:])])
    run(spark, topic, tmp_path / "log")

    assert seen(spark, tmp_path / "log") == {"e1", "e3", "e5", "e7", "e9", "e6", "e8"}

    broker.produce(topic, [("u1", None)])
    run(spark, topic, tmp_path / "log", epoch=2)
    assert seen(spark, tmp_path / "log") == {"e6", "e8"}


def seen(spark, log: Path) -> set[str]:
    return {row["event_id"] for row in read_events(spark, log).collect()}


def test_records_that_go_while_a_batch_is_read_are_a_hard_stop(
    spark, broker: Broker, topic: str, tmp_path: Path
) -> None:
    broker.produce(topic, keyed(random_events(60)), partition=0)
    real, admin = topic_source(topic, 1).look, broker.admin()
    run(spark, topic, tmp_path / "log", batch_records=10)
    broker.produce(topic, keyed(random_events(60)), partition=0)
    admin.delete_records([TopicPartition(topic, 0, 60)])[TopicPartition(topic, 0, 60)].result(WAIT_S)

    def look_then_delete() -> OpenedTopic:
        opened = real()
        admin.delete_records([TopicPartition(topic, 0, 100)])[TopicPartition(topic, 0, 100)].result(WAIT_S)
        return opened

    with pytest.raises(InputError, match="no longer has records that were not ingested yet"):
        run(spark, topic, tmp_path / "log", look=look_then_delete)
    assert len(logged(tmp_path / "log")) == 60
