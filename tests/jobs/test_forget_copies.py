"""Forgetting over a real topic, Redis and Spark: streams, compaction, and every way by which a user might come back."""

from __future__ import annotations

import time
from pathlib import Path
from uuid import uuid4

import msgspec
import pyarrow as pa
import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AlterConfigOpType, ConfigEntry, ConfigResource
from deltalake import DeltaTable, write_deltalake

from feature_repo.forgotten import read_forgotten
from feature_repo.handle import StoreHandle
from feature_repo.redis_settings import RedisSettings
from feature_repo.store import RowStore
from jobs.backfill import backfill
from jobs.forget import Places, forget, verify
from jobs.parity import raw_users
from models.checkpoint import Checkpoint
from models.errors import EventError
from models.event import Event, parse
from models.forgotten import FORGOTTEN_USER
from models.row import decode_row
from models.user_hash import KEY_FILE
from pipelines.dead_letters import read_dead_letters
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog
from pipelines.stream import StreamPlan, run
from pipelines.tombstones import TopicOfUsers
from tests.jobs.forgettable import (
    NEARLY,
    SCHEMA,
    WHO,
    fill,
    fold_at,
    make_log,
    put_events,
    redis_traces,
    some_events,
    traces,
)
from tests.jobs.tiny import logged, take
from tests.jobs.topics import held, keyed, take_topic
from tests.kafka_broker import Broker
from tests.pipelines.small_log import set_properties
from tests.redis_server import running_redis
from tests.small import small_checkpoint

COMPACTED = {
    # With the second one records may be deleted by name.
    "cleanup.policy": "compact,delete",
    "retention.ms": "-1",
    "segment.ms": "100",
    "min.cleanable.dirty.ratio": "0.001",
    "max.compaction.lag.ms": "100",
    "delete.retention.ms": "100",
}
QUICKLY = {"log.cleaner.backoff.ms": "500"}
COMPACTION_WAIT_S = 150.0
pytestmark = pytest.mark.slow


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "forget.key"
    path.write_bytes(bytes(range(48)))
    monkeypatch.setenv(KEY_FILE, str(path))
    return path


def rows_of(rows: RowStore, checkpoint: Checkpoint, users: list[str]) -> dict:
    return dict(zip(users, rows.get_rows(checkpoint.checkpoint_id, users), strict=True))


def stream(log: Path, checkpoint: Checkpoint, store: StoreHandle, topic: str, start: str = "resume") -> None:
    plan = StreamPlan(
        log_path=log / "events",
        checkpoint_path=checkpoint.path,
        store=store,
        dead_letters_path=log / "dead_letters",
        kafka=KafkaLog(kafka=kafka_settings(), topic=topic),
        start=start,
    )
    run(plan)


def copy_topic(broker: Broker, topic: str, log: Path) -> None:
    """The topic's records so far as its ingest has them, without Spark."""
    facts = {"vql.partitions": "2", "vql.epoch": "1", "vql.dense": "false", "vql.topic": topic, "vql.topic_id": "x"}
    set_properties(DeltaTable.create(log / "events", SCHEMA, partition_by=["partition"]), facts)
    good, bad = [], []
    for (partition, offset), (key, value, time_ms) in held(broker, topic).items():
        place = {"epoch": 1, "partition": partition, "offset": offset, "log_time_ms": time_ms, "value": value}
        try:
            good.append(place | msgspec.structs.asdict(parse(value or b"")))
        except EventError as error:
            bad.append(place | {"key": key, "reason": error.reason, "detail": str(error)})
    write_deltalake(log / "events", pa.Table.from_pylist(good, SCHEMA), mode="append")
    write_deltalake(log / "quarantine", pa.Table.from_pylist(bad))


def filler(n: int, partition: int) -> tuple[str, bytes]:
    """A record whose only use is that an earlier segment is closed."""
    event = Event(
        event_id=f"f{n}", user_id=f"filler{partition}", item_id="i1", action="view", event_time_ms=1_600_000_000_000 + n
    )
    return keyed([event])[0]


def compact(broker: Broker, topic: str) -> None:
    """From now on, and at once. Events keyed by user are compacted only when everything else has read them."""
    named = ((ConfigResource.Type.TOPIC, topic, COMPACTED), (ConfigResource.Type.BROKER, "1", QUICKLY))
    # Named: a client that is collected takes its questions with it.
    admin = broker.admin()
    for kind, name, settings in named:
        entries = [ConfigEntry(n, v, incremental_operation=AlterConfigOpType.SET) for n, v in settings.items()]
        resource = ConfigResource(kind, name, incremental_configs=entries)
        admin.incremental_alter_configs([resource])[resource].result(30.0)


def delete_what_has_another_key(broker: Broker, topic: str) -> None:
    """What names the user under another's key is not compacted: records up to it are deleted."""
    admin = broker.admin()
    places = [place for place, (_, value, _) in held(broker, topic).items() if value and WHO.encode() in value]
    for partition, offset in places:
        asked = TopicPartition(topic, partition, offset + 1)
        admin.delete_records([asked])[asked].result(30.0)


def wait_for_compaction(broker: Broker, topic: str) -> None:
    """Until no record of the user is in the topic; more records close the segments."""
    deadline_s = time.monotonic() + COMPACTION_WAIT_S
    n = 0
    while any(key == WHO.encode() for key, _, _ in held(broker, topic).values()):
        assert time.monotonic() < deadline_s, "the broker does not compact"
        for partition in range(2):
            broker.produce(topic, [filler(n, partition)], partition=partition)
        n += 1
        time.sleep(1.0)


@pytest.mark.timeout(900)
@pytest.mark.beam
def test_over_a_topic_a_user_is_gone_from_everywhere_its_compacted_records_included(
    broker: Broker, tmp_path: Path, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VQL_KAFKA_BOOTSTRAP_SERVERS", broker.address)
    topic = broker.create_topic(f"events-{uuid4().hex}")
    events, log = some_events(), tmp_path / "log"
    bad = [(WHO, b"no event"), (NEARLY, b"no event"), ("u2", b'{"uid": "%s"}' % WHO.encode())]
    broker.produce(topic, keyed(events) + bad)
    copy_topic(broker, topic, log)
    checkpoint, users = small_checkpoint(tmp_path / "checkpoint"), sorted({e.user_id for e in events} - {WHO})
    (tmp_path / "state").mkdir()
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis") as server, server.client() as client:
        store = StoreHandle(state=tmp_path / "state", redis=RedisSettings(url=server.url))
        stream(log, checkpoint, store, topic, "earliest")
        rows = store.open()
        before, others = rows_of(rows, checkpoint, users), [r for r in logged(log) if r["user_id"] != WHO]
        assert None not in before.values()
        where = Places(
            log=log,
            state=tmp_path / "state",
            rows=rows,
            key_file=key_file,
            topic=TopicOfUsers(source=KafkaLog(kafka=kafka_settings(), topic=topic)),
        )

        first = forget(where, WHO, retain_s=0)

        assert first.counts["rows emptied"] == 1
        assert len(first.remains) == 1, "its stream has not read the tombstone"
        assert (first.counts["dead_letters"], first.counts["quarantine"]) == (2, 2)
        # What the topic still holds is found, with what to do; nothing but that and the empty row is left.
        left = list(verify(where, WHO))
        assert {found.where.split(",")[0].split(" at ")[0] for found in left} == {
            "the online store",
            "Redis",
            f"topic {topic}",
        }
        assert all("for ever" in found.remedy for found in left if "topic" in found.where)

        stream(log, checkpoint, store, topic)
        assert forget(where, WHO, retain_s=0).remains == []
        assert {found.where.split(",")[0] for found in verify(where, WHO)} == {f"topic {topic}"}
        assert redis_traces(client) == []

        # A replay of the whole topic meets all of the user's records once more.
        stream(log, checkpoint, store, topic, "earliest")
        assert rows_of(rows, checkpoint, [WHO]) == {WHO: None}
        assert traces(log) == []

        # Others are as before, and the copy has every place but those.
        assert rows_of(rows, checkpoint, users) == before
        assert [row for row in logged(log) if row["user_id"] in users] == others
        assert len(read_dead_letters(log / "dead_letters")) == 3
        assert redis_traces(client) == []

        compact(broker, topic)
        assert all("compaction removes them" in found.remedy for found in verify(where, WHO))
        wait_for_compaction(broker, topic)
        delete_what_has_another_key(broker, topic)
        assert list(verify(where, WHO)) == []
        # What compaction left is read, and changes nothing.
        stream(log, checkpoint, store, topic)
        assert rows_of(rows, checkpoint, [*users, WHO]) == before | {WHO: None}


@pytest.mark.spark
def test_an_ingest_that_lags_leaves_the_user_out_and_counts_every_record(
    spark, broker: Broker, topic: str, tmp_path: Path, key_file: Path
) -> None:
    events, log = some_events(), tmp_path / "log"
    broker.produce(topic, keyed(events[:120]))
    take_topic(spark, topic, log)
    broker.produce(topic, [*keyed(events[120:]), (WHO, b"no event")])
    (tmp_path / "state").mkdir()
    where = Places(
        log=log,
        state=tmp_path / "state",
        rows=StoreHandle(state=tmp_path / "state", redis=None).open(),
        key_file=key_file,
        topic=TopicOfUsers(source=KafkaLog(kafka=kafka_settings(), topic=topic)),
    )
    forget(where, WHO, retain_s=0)
    broker.produce(topic, keyed([msgspec.structs.replace(events[0], user_id=WHO, event_id="back")]))

    report = take_topic(spark, topic, log)

    mine = sum(event.user_id == WHO for event in events[120:])
    assert report.records == len(events) - 120 + 3
    blank = [row for row in logged(log, "quarantine") if row["reason"] == FORGOTTEN_USER]
    assert len(blank) == mine + 1
    assert all(row["key"] is None and row["value"] is None for row in blank)
    assert [row["event_id"] for row in logged(log) if row["user_id"] == WHO] == ["back"]
    assert sum(row["user_id"] is None for row in logged(log)) == 1, "the tombstone's place"


@pytest.mark.spark
def test_files_that_are_ingested_again_bring_back_nothing_but_what_happened_later(
    spark, tmp_path: Path, key_file: Path
) -> None:
    log, rows = tmp_path / "log", [msgspec.structs.asdict(event) for event in some_events()]
    mine = sum(row["user_id"] == WHO for row in rows)
    bad = [row | {"event_id": f"bad{n}", "event_time_ms": 5} for n, row in enumerate(rows[:40])]
    take(spark, rows + bad, log)
    (tmp_path / "state").mkdir()
    opened = StoreHandle(state=tmp_path / "state", redis=None).open()
    where = Places(log=log, state=tmp_path / "state", rows=opened, key_file=key_file)
    assert traces(log)
    forget(where, WHO, retain_s=0)
    assert (traces(log), list(verify(where, WHO))) == ([], [])

    back = msgspec.structs.asdict(some_events()[0]) | {"user_id": WHO, "event_id": "back"}
    report = take(spark, [*rows, *bad, back | {"event_time_ms": int(time.time() * 1000) + 60_000}], log)

    assert (report.appended, report.already, report.read) == (1, len(rows) - mine, len(rows) + len(bad) + 1)
    assert report.forgotten == mine + sum(row["user_id"] == WHO for row in bad)
    assert [row["event_id"] for row in logged(log) if row["user_id"] == WHO] == ["back"]
    assert [events.num_rows for user, events in raw_users(log) if user == WHO] == [1]


@pytest.mark.spark
def test_a_backfill_leaves_out_what_a_restored_copy_brought_back(spark, tmp_path: Path, key_file: Path) -> None:
    log, events, checkpoint = tmp_path / "log", some_events(), small_checkpoint(tmp_path / "checkpoint")
    make_log(log, events)
    (tmp_path / "state").mkdir()
    store = StoreHandle(state=tmp_path / "state", redis=None)
    opened, users = store.open(), sorted({event.user_id for event in events} - {WHO})
    fill(opened, checkpoint, events, log)
    before = {u: decode_row(d, checkpoint.spec).recent_data for u, d in rows_of(opened, checkpoint, users).items()}
    where = Places(log=log, state=tmp_path / "state", rows=opened, key_file=key_file)
    (partition, offset) = forget(where, WHO, retain_s=0).requests[0][1:3]
    (old,) = [event for event in events if event.user_id == WHO][:1]
    held = {row["offset"] for row in logged(log) if row["partition"] == partition}
    put_events(log, partition, {next(n for n in range(offset) if n not in held): old})

    done = backfill(spark, checkpoint, log, store)

    assert (done.revision, done.users, done.cut[partition]) == (1, len(users), offset)
    found = {u: decode_row(d, checkpoint.spec).recent_data for u, d in rows_of(opened, checkpoint, users).items()}
    assert found == before
    assert rows_of(opened, checkpoint, [WHO]) == {WHO: None}
    assert DeltaTable(log / "events").metadata().configuration["vql.dense"] == "false"

    # Of one who came back there is what came after, in the row that the stream makes of it.
    back = msgspec.structs.replace(old, event_id="back")
    put_events(log, partition, {offset + 1: back})
    other = small_checkpoint(tmp_path / "other", seed=1)
    fold_at(opened, other, [old, back], [offset - 1, offset + 1], forgotten=read_forgotten(where.ref))
    (streamed,) = opened.get_rows(other.checkpoint_id, [WHO])

    assert backfill(spark, checkpoint, log, store).users == len(users) + 1

    (data,) = opened.get_rows(checkpoint.checkpoint_id, [WHO])
    found, wanted = decode_row(data, checkpoint.spec), decode_row(streamed, other.spec)
    assert (found.count, found.recent_data) == (1, wanted.recent_data)
    assert found.stamp.offset == wanted.stamp.offset == offset + 1
    assert found.folded_stamp.offset == wanted.folded_stamp.offset == offset
