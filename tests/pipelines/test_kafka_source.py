"""The reader over a real broker, and the stream over it: however a topic is delivered, the rows are a plain fold's."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest
from apache_beam.utils.timestamp import MAX_TIMESTAMP, MIN_TIMESTAMP
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import NewPartitions, OffsetSpec
from structlog.testing import capture_logs

from feature_repo.handle import StoreHandle
from feature_repo.store import RowStore
from models.checkpoint import Checkpoint
from models.errors import InputError, StoreError
from models.event import Event, Records
from models.row import Row, advance, new_row
from models.wire import Stamp
from pipelines import kafka_source, kafka_topic
from pipelines.dead_letters import read_dead_letters
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_source import (
    FETCH_WAIT_S,
    IDLE_WAIT_S,
    GroupOffsets,
    KafkaReader,
    KafkaSource,
    Turns,
    process_turns,
)
from pipelines.kafka_topic import KafkaLog, open_topic
from pipelines.records import Ledger, Slice
from pipelines.stream import StreamPlan, run
from pipelines.worker import forget_opened, stop_requested
from tests.kafka_broker import START_WAIT_S, Broker, send
from tests.pipelines.small_log import assert_rows_equal, read_rows, recent_of
from tests.small import random_events, small_checkpoint

pytestmark = pytest.mark.beam

BATCH_SIZE = 10
USERS = [f"u{n}" for n in range(30)]
REPOSITORY = Path(__file__).parents[2]
Places = Sequence[tuple[int, int]]


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget_opened()
    process_turns.cache_clear()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def plan(broker: Broker, topic: str, checkpoint: Checkpoint, tmp_path: Path) -> StreamPlan:
    (tmp_path / "state").mkdir()
    return StreamPlan(
        log_path=tmp_path / "no-log-of-files",
        checkpoint_path=checkpoint.path,
        store=StoreHandle(state=tmp_path / "state"),
        dead_letters_path=tmp_path / "dead_letters",
        kafka=KafkaLog(kafka=kafka_settings(bootstrap_servers=broker.address), topic=topic),
        start="earliest",
        batch_size=100,
        poll_s=0.05,
    )


@pytest.fixture
def readers(broker: Broker, topic: str, tmp_path: Path) -> Iterator[Callable[..., KafkaReader]]:
    """Opens readers of partition 0: after an offset, until an offset."""
    opened: list[KafkaReader] = []

    def reader(after: int = -1, until: int | None = None) -> KafkaReader:
        part = Slice(partition=0, after_offset=after, until_offset=until)
        opened.append(source(broker, topic, tmp_path, part).create_reader(None, None))
        return opened[-1]

    yield reader
    for each in opened:
        each.close()


def source(broker: Broker, topic: str, state: Path, *parts: Slice) -> KafkaSource:
    opened = open_topic(KafkaLog(kafka=kafka_settings(bootstrap_servers=broker.address), topic=topic))
    ledger = Ledger(store=StoreHandle(state=state), checkpoint_id="ab" * 16, epoch=1)
    return KafkaSource.of(opened, parts, ledger, BATCH_SIZE)


def drain(it: KafkaReader, wanted: int) -> list[Records]:
    """The batches until `wanted` records are there, or the reader has ended."""
    found: list[Records] = []
    deadline_s = time.monotonic() + 10
    while sum(map(len, found)) < wanted and time.monotonic() < deadline_s:
        if it.advance():
            found.append(it.get_current())
        elif it.get_watermark() == MAX_TIMESTAMP:
            break
    return found


def offsets(batches: list[Records]) -> list[int]:
    return [offset for batch in batches for offset in batch.offset_N.tolist()]


def values(first: int, count: int) -> list[tuple[str, bytes]]:
    return [("k", b"v%d" % n) for n in range(first, first + count)]


def test_records_come_in_offset_order_in_batches(broker: Broker, topic: str, readers) -> None:
    broker.produce(topic, values(0, 125), partition=0)
    broker.produce(topic, values(0, 9), partition=1)

    batches = drain(readers(), 125)

    assert offsets(batches) == list(range(125))
    assert [value for batch in batches for value in batch.values] == [value for _, value in values(0, 125)]
    assert max(len(batch) for batch in batches) == BATCH_SIZE
    assert {(batch.epoch, batch.partition, batch.offset_N.dtype) for batch in batches} == {(1, 0, np.dtype(np.int64))}


def test_a_record_without_value_is_passed_on_with_its_key(broker: Broker, topic: str, readers) -> None:
    broker.produce(topic, [("k", None), ("k", b"x")], partition=0)

    batches = drain(readers(), 2)
    assert [value for batch in batches for value in batch.values] == [None, b"x"]
    assert [key for batch in batches for key in batch.keys] == [b"k", b"k"]
    assert all((batch.log_time_ms_N > 0).all() for batch in batches)


def test_a_bounded_reader_ends_at_its_end_although_the_topic_goes_on(broker: Broker, topic: str, readers) -> None:
    broker.produce(topic, values(0, 30), partition=0)
    it = readers(after=4, until=17)

    assert it.get_watermark() == MIN_TIMESTAMP
    assert offsets(drain(it, 30)) == list(range(5, 18))
    assert (it.get_watermark(), it.get_checkpoint_mark().offset) == (MAX_TIMESTAMP, 17)


def test_an_empty_slice_ends_at_once(readers) -> None:
    it = readers(until=-1)

    assert not it.start()
    assert it.get_watermark() == MAX_TIMESTAMP


def test_an_endless_reader_waits_a_moment_and_sees_new_records(broker: Broker, topic: str, readers) -> None:
    broker.produce(topic, values(0, 12), partition=0)
    it = readers()
    assert offsets(drain(it, 12)) == list(range(12))

    started_s = time.monotonic()
    assert not any(it.advance() for _ in range(10))
    # An idle stream is not to be a busy one, on a runner that asks again at once.
    assert 5 * IDLE_WAIT_S < time.monotonic() - started_s < 2.0
    broker.produce(topic, values(12, 3), partition=0)

    assert offsets(drain(it, 3)) == [12, 13, 14]
    assert it.get_watermark() == MIN_TIMESTAMP


def test_a_reader_that_gave_all_there_was_gives_way_once(broker: Broker, topic: str, readers) -> None:
    broker.produce(topic, values(0, 12), partition=0)
    it = readers()
    drain(it, 12)
    broker.produce(topic, values(12, 5), partition=0)

    assert drain(it, 5)[-1].offset_N[-1] == 16
    broker.produce(topic, values(17, 5), partition=0)
    time.sleep(0.5)
    assert not it.advance()
    assert it.advance()


def test_readers_wait_only_while_all_of_them_are_idle() -> None:
    class Reader: ...

    turns = Turns()
    readers = [Reader() for _ in range(4)]
    for reader in readers:
        turns.join(reader)
    turns.note(found=True)
    waited_s = []
    for _ in range(5):
        waited_s.append(turns.wait_s(behind=False))
        turns.note(found=False)
    assert waited_s == [0.0, 0.0, 0.0, IDLE_WAIT_S / 4, IDLE_WAIT_S / 4]
    turns.leave(readers[0])
    turns.leave(readers[0])
    assert turns.wait_s(behind=True) == FETCH_WAIT_S / 3


def test_a_reader_that_was_dropped_without_being_closed_takes_no_turn() -> None:
    class Reader: ...

    turns = Turns()
    kept, dropped = Reader(), Reader()
    turns.join(kept)
    turns.join(dropped)
    del dropped
    assert turns.wait_s(behind=False) == IDLE_WAIT_S


def test_a_reader_made_from_a_mark_goes_on_after_it(broker: Broker, topic: str, tmp_path: Path) -> None:
    broker.produce(topic, values(0, 35), partition=0)
    (made,) = source(broker, topic, tmp_path, Slice(partition=0, after_offset=-1, until_offset=34)).split(20)
    it = made.create_reader(None, None)
    first = drain(it, 20)
    it.close()
    coder = made.get_checkpoint_mark_coder()

    again = made.create_reader(None, coder.decode(coder.encode(it.get_checkpoint_mark())))
    rest = drain(again, 35)
    again.close()

    assert offsets(first) + offsets(rest) == list(range(35))


def test_a_source_splits_into_its_partitions(broker: Broker, topic: str, tmp_path: Path) -> None:
    parts = [Slice(partition=p, after_offset=p, until_offset=None) for p in range(2)]

    assert [made.slices for made in source(broker, topic, tmp_path, *parts).split(1)] == [(part,) for part in parts]


def test_a_requested_stop_ends_the_reader_where_it_is(broker: Broker, topic: str, readers) -> None:
    broker.produce(topic, values(0, 30), partition=0)
    it = readers()
    drain(it, 1)
    stop_requested.set()

    assert not it.advance()
    assert it.get_watermark() == MAX_TIMESTAMP
    assert it.get_checkpoint_mark().offset == it.get_current().offset_N[-1]


def test_what_was_never_committed_is_not_read_and_its_gaps_do_not_hold_the_end_up(
    broker: Broker, topic: str, readers
) -> None:
    producer = Producer({"bootstrap.servers": broker.address, "transactional.id": topic})
    producer.init_transactions()
    for first, ends in ((0, producer.commit_transaction), (5, producer.abort_transaction)):
        producer.begin_transaction()
        send(producer, topic, values(first, 5), partition=0)
        ends()
    last = open_topic(KafkaLog(kafka=kafka_settings(bootstrap_servers=broker.address), topic=topic)).ends[0]
    it = readers(until=last)

    found = drain(it, 99)

    assert [value for batch in found for value in batch.values] == [value for _, value in values(0, 5)]
    assert last == 11  # five records and a marker, twice
    assert (it.get_watermark(), it.get_checkpoint_mark().offset) == (MAX_TIMESTAMP, last)


def test_offsets_that_compaction_or_an_abort_took_out_of_the_middle_are_no_error(
    broker: Broker, topic: str, readers
) -> None:
    producer = Producer({"bootstrap.servers": broker.address, "transactional.id": topic})
    producer.init_transactions()
    for first, ends in ((0, producer.commit_transaction), (5, producer.abort_transaction)):
        producer.begin_transaction()
        send(producer, topic, values(first, 5), partition=0)
        ends()
    # The broker writes the abort's marker, at offset 11, in its own time; what is produced before it would come first.
    place, admin = TopicPartition(topic, 0), broker.admin()
    _wait(lambda: admin.list_offsets({place: OffsetSpec.latest()})[place].result(START_WAIT_S).offset == 12)
    broker.produce(topic, values(10, 3), partition=0)

    assert offsets(drain(readers(), 8)) == [0, 1, 2, 3, 4, 12, 13, 14]


@pytest.mark.parametrize("after", [-1, 3, 200])
def test_an_offset_that_the_topic_does_not_have_stops_the_reader(
    broker: Broker, topic: str, readers, after: int
) -> None:
    broker.produce(topic, values(0, 20), partition=0)
    delete_before(broker, topic, 10)

    with pytest.raises(InputError, match=rf"{topic}, partition 0: offset {after + 1} is out of range.*vql backfill"):
        drain(readers(after=after), 20)


def test_records_deleted_under_a_reader_that_is_behind_stop_it(broker: Broker, topic: str, tmp_path: Path) -> None:
    broker.produce(topic, values(0, 20), partition=0)
    part = Slice(partition=0, after_offset=-1, until_offset=None)
    it = source(broker, topic, tmp_path, part).create_reader(None, None)
    mark = (drain(it, 1), it.get_checkpoint_mark())[1]
    it.close()
    delete_before(broker, topic, 15)

    with pytest.raises(InputError, match="offset 10 is out of range"):
        drain(source(broker, topic, tmp_path, part).create_reader(None, mark), 20)


def test_a_topic_created_again_under_a_reader_stops_it(
    broker: Broker, topic: str, readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_topic, "WATCH_INTERVAL_S", 0.01)
    it = read_then_create_again(broker, topic, readers())

    with pytest.raises((InputError, StoreError), match=r"raise the epoch|was deleted while it was read"):
        drain(it, 5)


def test_without_the_watch_the_other_topic_is_read_as_if_it_were_the_same(
    broker: Broker, topic: str, readers, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above, and the reason for the watch: Kafka's own client says nothing."""
    monkeypatch.setattr(kafka_topic.TopicWatch, "check", lambda _: None)
    it = read_then_create_again(broker, topic, readers())

    assert offsets(drain(it, 5)) == [10, 11, 12, 13, 14]


def test_a_finalised_mark_commits_to_the_store_and_for_tools_to_the_group(
    broker: Broker, topic: str, readers, tmp_path: Path
) -> None:
    broker.produce(topic, values(0, 25), partition=0)
    it = readers()
    drain(it, 25)

    it.get_checkpoint_mark().finalize_checkpoint()

    assert StoreHandle(state=tmp_path).open().positions("ab" * 16) == {0: (1, 24)}
    assert group_offsets(broker, f"vql-{'ab' * 16}", topic)[0] == 25


def test_a_group_is_told_once_in_a_while_and_at_the_end(broker: Broker, topic: str, readers) -> None:
    broker.produce(topic, values(0, 30), partition=0)
    told = GroupOffsets(kafka_settings(bootstrap_servers=broker.address), "a-group")

    told.commit(topic, 0, 10)
    told.commit(topic, 0, 20)
    assert group_offsets(broker, "a-group", topic)[0] == 10
    told.flush()

    assert group_offsets(broker, "a-group", topic)[0] == 20


def test_a_group_that_cannot_be_told_is_logged_and_holds_nothing_up(
    broker: Broker, topic: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kafka_source, "COMMIT_WAIT_S", 0.2)
    made = source(broker, topic, tmp_path, Slice(partition=0, after_offset=-1, until_offset=None))
    nowhere = kafka_settings(bootstrap_servers="127.0.0.1:1")

    with capture_logs() as logs:
        replace(made.ledger, kafka=nowhere).commit(0, 7)

    assert StoreHandle(state=tmp_path).open().positions("ab" * 16) == {0: (1, 7)}
    assert [entry["event"] for entry in logs] == ["group offsets not committed"]


def test_the_stream_writes_the_rows_of_a_plain_fold(broker: Broker, plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events = random_events(1500, users=30)
    places = produce(broker, plan, events)

    report = run(plan)

    assert_complete(plan, checkpoint, events, places)
    assert (report.records_read, report.events_folded, report.events_skipped) == (1500, 1500, 0)
    ends = {p: 1 + max(offset for q, offset in places if q == p) for p in (0, 1)}
    assert group_offsets(broker, f"vql-{checkpoint.checkpoint_id}", plan.kafka.topic) == ends


def test_a_topic_delivered_again_changes_nothing(broker: Broker, plan: StreamPlan, checkpoint: Checkpoint) -> None:
    produce(broker, plan, random_events(600, users=30))
    run(plan)
    before = rows_of(plan).get_rows(checkpoint.checkpoint_id, USERS)

    report = run(replace(plan, batch_size=37))

    assert (report.events_folded, report.events_skipped, report.rows_written) == (0, 600, 0)
    assert rows_of(plan).get_rows(checkpoint.checkpoint_id, USERS) == before


def test_a_stream_started_again_reads_only_what_is_new(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    events = random_events(900, users=30)
    places = produce(broker, plan, events[:500])
    run(plan)
    places += produce(broker, plan, events[500:])

    report = run(replace(plan, start="resume"))

    assert (report.records_read, report.events_skipped) == (400, 0)
    assert_complete(plan, checkpoint, events, places)


def test_a_reader_and_its_connection_live_as_long_as_the_stream(
    broker: Broker, plan: StreamPlan, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    create = KafkaSource.create_reader
    monkeypatch.setattr(KafkaSource, "create_reader", lambda self, *a: made.append(1) or create(self, *a))
    produce(broker, plan, random_events(600, users=30))

    run(replace(plan, batch_size=10, bundle_s=0.02))

    assert len(made) == 2


def test_a_tombstone_erases_its_user_and_no_other(broker: Broker, plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events = random_events(400, users=3)
    places = produce(broker, plan, events[:200])
    ((partition, offset),) = broker.produce(plan.kafka.topic, [("u0", None)])
    places += produce(broker, plan, events[200:])

    report = run(plan)

    assert (report.records_read, report.dead_letters) == (401, 0)
    assert report.events_folded + report.events_erased == 401
    left = [n for n, event in enumerate(events) if n >= 200 or event.user_id != "u0"]
    wanted = plain_rows(checkpoint, [events[n] for n in left], [places[n] for n in left])
    found = read_rows(rows_of(plan), checkpoint, USERS)
    assert {u: row.count for u, row in found.items()} == {u: row.count for u, row in wanted.items()}
    assert found["u0"].recent.tobytes() == wanted["u0"].recent.tobytes()
    assert (partition, True) == (found["u0"].stamp.partition, found["u0"].stamp.offset > offset)


def test_bad_records_and_tombstones_of_nobody_are_kept_as_dead_letters(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    events = random_events(200, users=30)
    places = produce(broker, plan, events[:100])
    broker.produce(plan.kafka.topic, [(None, None), ("u1", b"{")], partition=1)
    places += produce(broker, plan, events[100:])

    report = run(plan)

    assert (report.records_read, report.dead_letters, report.events_folded) == (202, 2, 200)
    assert_rows_equal(read_rows(rows_of(plan), checkpoint, USERS), plain_rows(checkpoint, events, places))
    assert [(x.partition, x.reason, x.value) for x in read_dead_letters(plan.dead_letters_path)] == [
        (1, "key", None),
        (1, "json", b"{"),
    ]


def test_records_that_retention_took_stop_the_next_start_and_the_rows_stay(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    produce(broker, plan, random_events(100, users=30))
    run(plan)
    before = rows_of(plan).get_rows(checkpoint.checkpoint_id, USERS)
    (_, last) = produce(broker, plan, random_events(300, users=1))[-1]
    delete_before(broker, plan.kafka.topic, last, partition_of_u0(plan, broker))

    with pytest.raises(InputError, match=rf"is out of range; it begins at {last}.*vql backfill"):
        run(replace(plan, start="resume"))

    assert rows_of(plan).get_rows(checkpoint.checkpoint_id, USERS) == before


def test_a_shorter_topic_of_the_same_name_is_refused(broker: Broker, plan: StreamPlan, checkpoint: Checkpoint) -> None:
    produce(broker, plan, random_events(100, users=30))
    run(plan)
    broker.delete_topic(plan.kafka.topic)
    broker.create_topic(plan.kafka.topic)

    with pytest.raises(StoreError, match="the rows hold partition"):
        run(replace(plan, start="resume"))
    with pytest.raises(StoreError, match=r"of epoch 1, but .* of epoch 2; run vql backfill"):
        run(replace(plan, start="resume", kafka=replace(plan.kafka, epoch=2)))


def test_a_topic_created_again_while_no_stream_runs_is_refused_however_long_it_grew(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    produce(broker, plan, random_events(100, users=30))
    run(plan)
    before = rows_of(plan).get_rows(checkpoint.checkpoint_id, USERS)
    broker.delete_topic(plan.kafka.topic)
    broker.create_topic(plan.kafka.topic)
    produce(broker, plan, random_events(400, users=30, seed=1))

    for start in ("resume", "earliest"):
        with pytest.raises(StoreError, match=r"made from the Kafka topic of id .*raise the epoch"):
            run(replace(plan, start=start))

    assert rows_of(plan).get_rows(checkpoint.checkpoint_id, USERS) == before


def test_a_topic_with_more_partitions_than_it_had_is_refused(broker: Broker, plan: StreamPlan) -> None:
    produce(broker, plan, random_events(100, users=30))
    run(plan)
    topic, admin = plan.kafka.topic, broker.admin()
    admin.create_partitions([NewPartitions(topic, 3)])[topic].result(START_WAIT_S)
    _wait(lambda: len(open_topic(plan.kafka).ends) == 3)

    with pytest.raises(StoreError, match=r"and 2 partitions, and this is .* and 3 partitions.*raise the epoch"):
        run(replace(plan, start="earliest"))


def test_what_cannot_be_read_is_said_before_anything_runs(plan: StreamPlan) -> None:
    with pytest.raises(InputError, match="has no such topic"):
        run(replace(plan, kafka=replace(plan.kafka, topic="nowhere")))
    nowhere = kafka_settings(bootstrap_servers="127.0.0.1:1", timeout_s=0.5)
    with pytest.raises(InputError, match=r"127\.0\.0\.1:1 cannot be used"):
        run(replace(plan, kafka=replace(plan.kafka, kafka=nowhere)))


def test_an_endless_stream_picks_up_new_records_until_it_is_told_to_stop(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    events = random_events(400, users=30)
    places: list[tuple[int, int]] = []

    def feed() -> None:
        for share in range(4):
            places.extend(produce(broker, plan, events[share * 100 : share * 100 + 100]))
            _wait(lambda: _committed(plan, checkpoint) == len(places))
        stop_requested.set()

    feeder = threading.Thread(target=feed)
    feeder.start()
    report = run(replace(plan, until="forever"))
    feeder.join()

    assert report.events_folded == 400
    assert_complete(plan, checkpoint, events, places)


@pytest.mark.slow
def test_a_killed_stream_goes_on_where_its_rows_are(broker: Broker, plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events = random_events(1500, users=30)
    places = produce(broker, plan, events)
    process = _start(replace(plan, batch_size=10, bundle_s=0.05))
    _wait(lambda: len(rows_of(plan).positions(checkpoint.checkpoint_id)) == 2, process)
    process.kill()
    process.wait()

    report = run(replace(plan, start="resume"))

    assert report.records_read < 1500
    assert_complete(plan, checkpoint, events, places)


@pytest.mark.slow
def test_processes_with_their_shares_of_the_partitions_make_the_whole(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    events = random_events(1500, users=30)
    places = produce(broker, plan, events)

    processes = [_start(replace(plan, partitions=(partition,))) for partition in (0, 1)]

    assert [process.wait(240) for process in processes] == [0, 0]
    assert_complete(plan, checkpoint, events, places)


def read_then_create_again(broker: Broker, topic: str, it: KafkaReader) -> KafkaReader:
    """Ten records are read; then the topic is another one, of fifteen."""
    broker.produce(topic, values(0, 10), partition=0)
    drain(it, 10)
    broker.delete_topic(topic)
    broker.create_topic(topic)
    broker.produce(topic, values(0, 15), partition=0)
    return it


def produce(broker: Broker, plan: StreamPlan, events: Sequence[Event]) -> list[tuple[int, int]]:
    """Append the events by their users; the partition and offset that each one got."""
    return broker.produce(plan.kafka.topic, [(event.user_id, msgspec.json.encode(event)) for event in events])


def plain_rows(checkpoint: Checkpoint, events: Sequence[Event], places: Places) -> dict[str, Row]:
    """Each user's row from scratch, all events at once, at the places where Kafka put them."""
    using = checkpoint.fold()
    rows = {}
    for user_id in {event.user_id for event in events}:
        mine = [(event, place) for event, place in zip(events, places, strict=True) if event.user_id == user_id]
        (partition,) = {place[0] for _, place in mine}
        recent = recent_of(checkpoint, [event for event, _ in mine], [offset for _, (_, offset) in mine])
        stamp = Stamp(epoch=1, partition=partition, offset=-1)
        rows[user_id], _ = advance(new_row(using.spec, 1, partition), recent, stamp, using)
    return rows


def assert_complete(plan: StreamPlan, checkpoint: Checkpoint, events: Sequence[Event], places: Places) -> None:
    assert_rows_equal(read_rows(rows_of(plan), checkpoint, USERS), plain_rows(checkpoint, events, places))
    ends = {p: (1, max(offset for q, offset in places if q == p)) for p in (0, 1)}
    assert rows_of(plan).positions(checkpoint.checkpoint_id) == ends


def rows_of(plan: StreamPlan) -> RowStore:
    return plan.store.open()


def partition_of_u0(plan: StreamPlan, broker: Broker) -> int:
    ((partition, _),) = produce(broker, plan, random_events(1, users=1))
    return partition


def delete_before(broker: Broker, topic: str, offset: int, partition: int = 0) -> None:
    admin = broker.admin()
    for future in admin.delete_records([TopicPartition(topic, partition, offset)]).values():
        future.result(START_WAIT_S)


def group_offsets(broker: Broker, group: str, topic: str) -> dict[int, int]:
    admin = broker.admin()
    asked = ConsumerGroupTopicPartitions(group)
    found = admin.list_consumer_group_offsets([asked])[group].result(START_WAIT_S).topic_partitions
    return {each.partition: each.offset for each in found if each.topic == topic}


def _committed(plan: StreamPlan, checkpoint: Checkpoint) -> int:
    """How many records are committed."""
    return sum(offset + 1 for _, offset in rows_of(plan).positions(checkpoint.checkpoint_id).values())


def _wait(done: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    deadline_s = time.monotonic() + 60
    while not done():
        assert process is None or process.poll() is None, "the stream ended by itself"
        assert time.monotonic() < deadline_s, "waited a minute in vain"
        time.sleep(0.02)


def _start(plan: StreamPlan) -> subprocess.Popen:
    """A stream in a process of its own."""
    program = (
        "from pathlib import Path; from feature_repo.handle import StoreHandle\n"
        "from pipelines.kafka_settings import kafka_settings; from pipelines.kafka_topic import KafkaLog\n"
        "from pipelines.stream import StreamPlan, run\n"
        f"kafka = KafkaLog(kafka=kafka_settings(), topic={plan.kafka.topic!r})\n"
        f"run(StreamPlan(log_path=Path('none'), checkpoint_path=Path({str(plan.checkpoint_path)!r}), kafka=kafka, "
        f"store=StoreHandle(state=Path({str(plan.store.state)!r})), start={plan.start!r}, "
        f"dead_letters_path=Path({str(plan.dead_letters_path)!r}), partitions={plan.partitions!r}, "
        f"batch_size={plan.batch_size}, bundle_s={plan.bundle_s}, poll_s={plan.poll_s}))"
    )
    environment = os.environ | {"VQL_KAFKA_BOOTSTRAP_SERVERS": plan.kafka.kafka.bootstrap_servers, "PYTHONPATH": ""}
    return subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, env=environment)
