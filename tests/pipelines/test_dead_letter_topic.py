from __future__ import annotations

import os

import pytest

from models.errors import StoreError
from pipelines import dead_letter_topic
from pipelines.dead_letter_topic import DeadLetterTopic, LetterSender
from pipelines.dead_letters import DeadLetter
from pipelines.kafka_settings import kafka_settings
from tests.kafka_broker import Broker
from tests.pipelines.letters_on_topics import messages_of

pytestmark = pytest.mark.beam


def letter(offset: int, value: bytes | None, key: bytes | None = b"k") -> DeadLetter:
    return DeadLetter(
        epoch=3,
        partition=1,
        offset=offset,
        reason="json",
        detail="half a pair: \ud800, é",
        value=value,
        key=key,
        log_time_ms=1_600_000_000_000,
    )


def sender(broker: Broker, topic: str) -> LetterSender:
    settings = kafka_settings(bootstrap_servers=broker.address)
    return LetterSender(DeadLetterTopic(kafka=settings, topic=topic), "events")


def test_a_letter_is_its_original_with_its_position_and_reason_as_headers(broker: Broker, topic: str) -> None:
    originals = [(b"\xff{", b"\x00k"), (None, b"k"), (b"", None)]

    refused = sender(broker, topic).send([letter(n, value, key) for n, (value, key) in enumerate(originals)])

    assert refused == []
    found = {dict(message.headers())["offset"]: message for message in messages_of(broker, topic)}
    assert [(found[b"%d" % n].value(), found[b"%d" % n].key()) for n in range(3)] == originals
    assert dict(found[b"0"].headers()) == {
        "reason": b"json",
        "detail": "half a pair: \\ud800, é".encode(),
        "topic": b"events",
        "epoch": b"3",
        "partition": b"1",
        "offset": b"0",
        "log_time_ms": b"1600000000000",
    }


def test_an_original_of_ten_megabytes_stays_whole(broker: Broker) -> None:
    topic, original = broker.create_topic("large", 1, **{"max.message.bytes": "20000000"}), os.urandom(10_000_000)

    assert sender(broker, topic).send([letter(0, original)]) == []
    assert [message.value() for message in messages_of(broker, topic, 1)] == [original]


def test_what_the_broker_refuses_for_its_size_comes_back_and_the_rest_is_there(broker: Broker, topic: str) -> None:
    large, small = letter(0, os.urandom(3_000_000)), letter(1, b"{")

    assert sender(broker, topic).send([large, small, letter(2, b"[")]) == [large]
    assert {message.value() for message in messages_of(broker, topic)} == {b"{", b"["}


def test_letters_that_the_broker_does_not_take_are_an_error(broker: Broker) -> None:
    # A compacted topic takes no record without a key.
    topic = broker.create_topic("compacted", 1, **{"cleanup.policy": "compact"})

    with pytest.raises(StoreError, match="2 of 2 dead letters were not taken by topic compacted"):
        sender(broker, topic).send([letter(0, b"{", None), letter(1, b"[", None)])


def test_letters_that_nobody_answers_for_are_an_error(
    broker: Broker, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter_topic, "DELIVERY_WAIT_S", 1.0)
    mine = sender(broker, topic)
    assert mine.send([letter(0, b"{")]) == []
    broker.delete_topic(topic)

    with pytest.raises(StoreError, match="1 of 1 dead letters were not taken"):
        mine.send([letter(1, b"[")])
