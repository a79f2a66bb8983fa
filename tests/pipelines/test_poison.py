"""Every kind of bad record becomes one letter with its reason, and leaves no trace in any row."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_repo.handle import StoreHandle
from models.checkpoint import Checkpoint
from models.event import EVENT_TIME_MS_MAX, EVENT_TIME_MS_MIN, REASONS, Records, parse_batch
from pipelines.dead_letters import read_dead_letters
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog
from pipelines.poison import LARGE_BYTES, USER, corpus, poisoned, small_corpus
from pipelines.stream import StreamPlan, run
from tests.kafka_broker import Broker
from tests.pipelines.small_log import assert_rows_equal, read_rows
from tests.poison import LARGE_TOPIC, control, produce, with_poison
from tests.small import random_events, small_checkpoint

USERS = [f"u{n}" for n in range(30)]


def records_of(keys: list[bytes | None], values: list[bytes | None], log_time_ms: int = -1) -> Records:
    return Records(
        epoch=1,
        partition=0,
        offset_N=np.arange(len(values)),
        log_time_ms_N=np.full(len(values), log_time_ms),
        keys=keys,
        values=values,
    )


@pytest.mark.beam
def test_the_corpus_becomes_letters_and_the_rows_are_those_of_a_topic_without_it(
    broker: Broker, tmp_path: Path
) -> None:
    checkpoint, poison = small_checkpoint(tmp_path / "checkpoint"), corpus()
    mixed = with_poison(random_events(1500, users=30), poison)

    bad_plan, places = streamed(broker, tmp_path / "poisoned", checkpoint, mixed)
    report = run(bad_plan)
    control_plan, _ = streamed(broker, tmp_path / "control", checkpoint, control(mixed))
    control_report = run(control_plan)

    letters = {(x.partition, x.offset): x for x in read_dead_letters(bad_plan.dead_letters_path)}
    wanted = {place: record.poison for place, record in zip(places, mixed, strict=True) if record.poison is not None}
    assert {place: x.reason for place, x in letters.items()} == {place: x.reason for place, x in wanted.items()}
    for place, bad in wanted.items():
        letter = letters[place]
        assert (letter.key, letter.log_time_ms) == (bad.key, bad.log_time_ms), bad.name
        assert (letter.value or b"") == (bad.value or b""), bad.name
    assert (report.dead_letters, report.events_folded) == (len(poison), 1500)
    assert (control_report.dead_letters, control_report.events_folded) == (0, 1500 + len(poison))
    found, wanted_rows = (read_rows(plan.store.open(), checkpoint, USERS) for plan in (bad_plan, control_plan))
    # Not byte for byte: where a batch ends decides how floats are rounded, and the broker ends batches as it likes.
    assert_rows_equal(found, wanted_rows)
    assert len(found) > 20
    # Nobody has a row but those who have events.
    assert bad_plan.store.open().get_rows(checkpoint.checkpoint_id, [USER, "another"]) == [None, None]


def streamed(
    broker: Broker, folder: Path, checkpoint: Checkpoint, records: list
) -> tuple[StreamPlan, list[tuple[int, int]]]:
    """A stream's plan over a new topic with the records, and the place of each of these."""
    (folder / "state").mkdir(parents=True)
    topic = broker.create_topic(f"{folder.name}-{folder.parent.name}", **LARGE_TOPIC)
    places = produce(broker, topic, records)
    plan = StreamPlan(
        log_path=folder / "no-log-of-files",
        checkpoint_path=checkpoint.path,
        store=StoreHandle(state=folder / "state"),
        dead_letters_path=folder / "dead_letters",
        kafka=KafkaLog(kafka=kafka_settings(bootstrap_servers=broker.address), topic=topic),
        start="earliest",
        batch_size=100,
        poll_s=0.05,
    )
    return plan, places


def test_the_corpus_has_every_reason_and_the_ten_megabytes() -> None:
    poison = corpus()

    assert {bad.reason for bad in poison} == set(REASONS)
    assert max(len(bad.value or b"") for bad in poison) == LARGE_BYTES == 10_000_000
    assert len({bad.name for bad in poison}) == len(poison)


@pytest.mark.parametrize("bad", corpus(), ids=lambda bad: bad.name)
def test_each_mistake_alone_gets_its_reason(bad) -> None:
    found, rejects = parse_batch(records_of([bad.key], [bad.value], bad.log_time_ms))

    assert ([reject.reason for reject in rejects], len(found)) == ([bad.reason], 0), rejects


def test_without_its_mistake_the_event_of_the_corpus_is_taken() -> None:
    """Else each of the above might be refused for something else."""
    late = next(bad for bad in corpus() if bad.reason == "future")

    found, rejects = parse_batch(records_of([late.key], [late.value], late.log_time_ms + 3_600_000))

    assert (len(found), rejects) == (1, [])


def test_poison_lies_between_events_that_keep_their_order() -> None:
    records = [(b"k", b"v%d" % n) for n in range(990)]

    mixed = poisoned(records, 0.01, seed=3)

    assert [record for record in mixed if record in set(records)] == records
    assert len(mixed) == 1000
    assert mixed == poisoned(records, 0.01, seed=3) != poisoned(records, 0.01, seed=4)
    assert poisoned(records, 0.0, seed=3) == records
    kinds = {(bad.key, bad.value) for bad in small_corpus()}
    assert {record for record in mixed if record not in set(records)} <= kinds


Json = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(-(2**70), 2**70),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
Times = st.integers(-(2**70), 2**70) | st.integers(EVENT_TIME_MS_MIN, EVENT_TIME_MS_MAX)
# As Python writes JSON: NaN, Infinity and halves of surrogate pairs included.
NearlyEvents = st.fixed_dictionaries(
    {name: st.text(max_size=200) | Json for name in ("event_id", "user_id", "item_id", "action")}
    | {"event_time_ms": Times | Json},
    optional={"weight": st.floats() | st.integers() | Json, "more": Json},
).map(lambda fields: json.dumps(fields).encode())
Keys = st.none() | st.binary(max_size=200) | st.text(max_size=20).map(lambda s: s.encode("utf-8", "surrogatepass"))
Values = st.none() | st.binary(max_size=300) | NearlyEvents | NearlyEvents.map(lambda value: value[:-3])


@given(st.lists(st.tuples(Keys, Values), max_size=5), st.sampled_from([-1, 0, 1_600_000_000_000, 2**62]))
def test_any_bytes_are_an_event_or_a_letter_with_a_known_reason(records: list, log_time_ms: int) -> None:
    whole = records_of([key for key, _ in records], [value for _, value in records], log_time_ms)

    found, rejects = parse_batch(whole)

    offsets = [*found.offset_N.tolist(), *(reject.offset for reject in rejects)]
    assert sorted(offsets) == list(range(len(records)))
    assert {reject.reason for reject in rejects} <= set(REASONS)
    assert all(reject.detail for reject in rejects)
    assert np.isfinite(found.weight_N).all()
    for user_id in found.user_ids:
        assert 1 <= len(user_id.encode()) <= 128


@given(st.lists(st.tuples(Keys, Values), max_size=4))
def test_a_bad_neighbour_changes_nothing_about_an_event(records: list) -> None:
    (event,) = random_events(1)
    mine = (event.user_id.encode(), msgspec.json.encode(event))
    mixed = [*records, mine, *records]

    found, _ = parse_batch(records_of([key for key, _ in mixed], [value for _, value in mixed]))
    (place,) = np.flatnonzero(found.offset_N == len(records))

    assert (found.event_ids[place], found.time_ms_N[place]) == (event.event_id, event.event_time_ms)
    assert msgspec.structs.replace(event, weight=float(found.weight_N[place])) == event
