"""The step within a stream over a real topic: where letters are, and that nothing is committed before they are."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from feature_repo.handle import StoreHandle
from models.checkpoint import Checkpoint
from models.errors import InputError, StoreError
from pipelines import held_letters
from pipelines.dead_letter_topic import DeadLetterTopic
from pipelines.dead_letters import DeadLetter, read_dead_letters
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog
from pipelines.keep_dead_letters import KeepDeadLetters
from pipelines.stream import StreamPlan, run
from pipelines.worker import forget_opened
from tests.kafka_broker import Broker
from tests.pipelines.letters_on_topics import messages_of
from tests.small import small_checkpoint

pytestmark = pytest.mark.beam

BAD = [(b"k%d" % n, b"{%d" % n) for n in range(5)]


@pytest.fixture(autouse=True)
def nothing_held() -> None:
    """A stream that fails leaves its letters in memory, until the next one in this process."""
    forget_opened()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def plan(broker: Broker, topic: str, checkpoint: Checkpoint, tmp_path: Path) -> StreamPlan:
    (tmp_path / "state").mkdir()
    kafka = kafka_settings(bootstrap_servers=broker.address)
    broker.produce(topic, BAD, partition=0)
    letters = broker.create_topic(f"letters-{uuid4().hex}")
    return StreamPlan(
        log_path=tmp_path / "no-log-of-files",
        checkpoint_path=checkpoint.path,
        store=StoreHandle(state=tmp_path / "state"),
        dead_letters_path=tmp_path / "dead_letters",
        kafka=KafkaLog(kafka=kafka, topic=topic),
        dead_letters_topic=DeadLetterTopic(kafka=kafka, topic=letters),
        start="earliest",
        poll_s=0.05,
    )


def alone(plan: StreamPlan) -> StreamPlan:
    return replace(plan, dead_letters_topic=replace(plan.dead_letters_topic, alone=True))


def test_letters_are_in_the_table_and_on_the_topic(broker: Broker, plan: StreamPlan) -> None:
    report = run(plan)

    assert (report.dead_letters, report.dead_letters_sent, report.dead_letters_too_large) == (5, 5, 0)
    assert [(x.key, x.value) for x in read_dead_letters(plan.dead_letters_path)] == BAD
    sent = messages_of(broker, plan.dead_letters_topic.topic)
    assert {(message.key(), message.value()) for message in sent} == set(BAD)
    assert {dict(message.headers())["topic"] for message in sent} == {plan.kafka.topic.encode()}


def test_a_repeat_sends_copies_that_the_headers_tell(broker: Broker, plan: StreamPlan) -> None:
    first, again = run(plan), run(plan)

    assert (first.dead_letters, again.dead_letters, again.dead_letters_sent) == (5, 0, 5)
    sent = [dict(message.headers()) for message in messages_of(broker, plan.dead_letters_topic.topic)]
    assert len(sent) == 10
    assert len({(x["topic"], x["epoch"], x["partition"], x["offset"]) for x in sent}) == 5


def test_letters_can_go_to_the_topic_alone(broker: Broker, plan: StreamPlan) -> None:
    report = run(alone(plan))

    assert (report.dead_letters, report.dead_letters_sent) == (0, 5)
    assert not plan.dead_letters_path.exists()
    assert len(messages_of(broker, plan.dead_letters_topic.topic)) == 5


def test_one_too_large_for_the_topic_is_kept_in_the_table_and_counted(broker: Broker, plan: StreamPlan) -> None:
    large = DeadLetter(
        epoch=1, partition=0, offset=9, reason="size", detail="large", value=os.urandom(3_000_000), key=b"k"
    )
    step = KeepDeadLetters(plan.dead_letters_path, alone(plan).dead_letters_topic, "events")
    step.setup()
    step.process([large])
    step.process([replace(large, offset=10, value=b"{")])
    step.finish_bundle()

    assert read_dead_letters(plan.dead_letters_path) == [large]
    assert [message.value() for message in messages_of(broker, plan.dead_letters_topic.topic)] == [b"{"]


def test_a_topic_that_does_not_take_letters_stops_the_stream_before_anything_is_committed(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    broker.produce(plan.kafka.topic, [(None, b"{")], partition=0)
    # A compacted topic takes no record without a key.
    refusing = broker.create_topic(f"compacted-{uuid4().hex}", 1, **{"cleanup.policy": "compact"})

    with pytest.raises(StoreError, match="were not taken by topic compacted"):
        run(replace(plan, dead_letters_topic=replace(plan.dead_letters_topic, topic=refusing)))

    assert {offset for _, offset in plan.store.open().positions(checkpoint.checkpoint_id).values()} <= {-1}
    assert run(plan).dead_letters_sent == 6


def test_a_bundle_of_nothing_but_large_letters_is_kept_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(held_letters, "BYTES_HELD", 100)
    step, letters = (
        KeepDeadLetters(tmp_path / "d"),
        [DeadLetter(epoch=1, partition=0, offset=n, reason="size", detail="", value=b"x" * 60) for n in range(3)],
    )
    step.setup()
    for each in letters[:2]:
        step.process([each])

    assert read_dead_letters(tmp_path / "d") == letters[:2]
    step.process(letters[2:])
    step.finish_bundle()
    assert read_dead_letters(tmp_path / "d") == letters


@pytest.mark.parametrize(("same", "words"), [(True, "the topic that is read"), (False, "has no such topic")])
def test_a_topic_that_cannot_take_letters_is_said_before_anything_runs(
    plan: StreamPlan, same: bool, words: str
) -> None:
    name = plan.kafka.topic if same else "no-such-topic"

    with pytest.raises(InputError, match=words):
        run(replace(plan, dead_letters_topic=replace(plan.dead_letters_topic, topic=name)))

    assert not plan.dead_letters_path.exists()
