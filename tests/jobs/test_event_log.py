"""What stands in a topic's copy: backfill, stream, training and the independent check agree with the topic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.backfill import backfill
from jobs.event_log import forgotten_here, read_events, tombstones, without_forgotten
from jobs.parity import compare_rows
from models.checkpoint import Checkpoint
from models.errors import EventError
from models.event import Event, parse, tombstone
from models.forgotten import Forgotten, Request
from models.row import Row, advance, new_row
from models.wire import Stamp
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog
from pipelines.stream import StreamPlan
from pipelines.stream import run as stream
from tests.jobs.topics import held, keyed, take_topic
from tests.kafka_broker import Broker
from tests.pipelines.small_log import assert_rows_equal, read_rows, recent_of
from tests.small import START_MS, random_events, small_checkpoint

pytestmark = pytest.mark.spark


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
    take_topic(spark, topic, tmp_path / "log", batch_records=100)
    users = [f"u{n}" for n in range(20)] + ["gone"]

    done = backfill(spark, checkpoint, tmp_path / "log", plan.store)

    assert done.events == cut
    assert_rows_equal(read_rows(plan.store.open(), checkpoint, users), plain_rows(checkpoint, held(broker, topic)))
    broker.produce(topic, records[cut:])
    report = stream(plan)
    # Skipped are those that a later tombstone of the same batch erases.
    assert report.events_folded + report.events_erased == len(records) - cut
    assert report.dead_letters == len(bad)
    assert_rows_equal(read_rows(plan.store.open(), checkpoint, users), plain_rows(checkpoint, held(broker, topic)))
    assert read_rows(plan.store.open(), checkpoint, ["gone"])["gone"].count == 0

    # The same from the log's own table: all of it is in the rows already.
    take_topic(spark, topic, tmp_path / "log")
    again = stream(replace(plan, kafka=None, start="earliest"))
    assert (again.events_folded, again.events_skipped, again.dead_letters) == (0, len(records), 0)


def test_the_copy_replayed_gives_the_rows_of_the_topic(
    spark, broker: Broker, topic: str, tmp_path: Path, checkpoint: Checkpoint, plan: StreamPlan
) -> None:
    broker.produce(topic, [("u1", b"{}"), *records_with_tombstones(random_events(400)), ("u1", b"{}")])
    take_topic(spark, topic, tmp_path / "log")

    stream(replace(plan, kafka=None, start="earliest", batch_size=30))

    wanted = plain_rows(checkpoint, held(broker, topic))
    assert_rows_equal(read_rows(plan.store.open(), checkpoint, list(wanted)), wanted)


def test_rows_of_a_copy_agree_with_the_independent_check(
    spark, broker: Broker, topic: str, tmp_path: Path, checkpoint: Checkpoint, plan: StreamPlan
) -> None:
    broker.produce(topic, records_with_tombstones(random_events(300)))
    take_topic(spark, topic, tmp_path / "log")
    backfill(spark, checkpoint, tmp_path / "log", plan.store)

    parity = compare_rows(Reader(plan.store.open(), Opened(checkpoint)), tmp_path / "log")

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
    take_topic(spark, topic, tmp_path / "log")

    assert seen(spark, tmp_path / "log") == {"e1", "e3", "e5", "e7", "e9", "e6", "e8"}

    broker.produce(topic, [("u1", None)])
    take_topic(spark, topic, tmp_path / "log", epoch=2)
    assert seen(spark, tmp_path / "log") == {"e6", "e8"}


def seen(spark, log: Path) -> set[str]:
    return {row["event_id"] for row in read_events(spark, log).collect()}


def test_what_is_forgotten_is_left_out_wherever_a_request_covers_it(spark, tmp_path: Path) -> None:
    (tmp_path / "key").write_bytes(bytes(32))
    requests = {
        "a": (Request(2, 0, 5, 1_000), Request(2, 0, 8, 2_000)),
        "b": (Request(3, 0, 0, 1_000),),
        "absent": (Request(2, 1, 9, 1_000),),
    }
    known = Forgotten(key_file=tmp_path / "key")
    forgotten = replace(known, requests={known.hash(user_id): each for user_id, each in requests.items()})
    places = [("a", 0, 8), ("a", 0, 9), ("a", 1, 3), ("b", 0, 70), ("c", 0, 1), (None, 0, 7)]
    rows = [(2, partition, offset, f"{user}-{offset}", user) for user, partition, offset in places]
    records = spark.createDataFrame(rows, "epoch int, partition int, offset long, event_id string, user_id string")

    gone = forgotten_here(records, forgotten)

    assert gone == {user_id: requests[user_id] for user_id in ("a", "b")}
    left = without_forgotten(records, gone).select("user_id", "partition", "offset").collect()
    assert sorted(map(tuple, left)) == [("a", 0, 9), ("a", 1, 3), ("c", 0, 1)]
    # b's request is of a later epoch, in which nothing of this one counts.
    (place,) = tombstones(spark, gone, 2).collect()
    assert (place.user_id, place.partition, place.offset, place.value, place.log_time_ms) == ("a", 0, 8, None, 2_000)
    assert forgotten_here(records, known) == {}
    assert without_forgotten(records, {}).count() == len(places) - 1
