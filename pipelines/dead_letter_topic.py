"""Dead letters on a Kafka topic: the original key and bytes as they were, and what is known of them as headers.

At least once: a bundle that is repeated sends its letters again. Readers tell copies by the headers `topic`,
`epoch`, `partition` and `offset`, the position of the record that was bad.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from models.errors import InputError, StoreError
from pipelines.dead_letters import DeadLetter
from pipelines.kafka_settings import KafkaSettings

DELIVERY_WAIT_S = 60.0
# The broker alone decides what is too large: it sees records compressed, as it did when it took the original.
PRODUCER_OPTIONS = {
    "acks": "all",
    "message.max.bytes": 1_000_000_000,
    "compression.type": "zstd",
    "linger.ms": 5,
    # Whoever sends holds the letters already, and bounds them.
    "queue.buffering.max.messages": 0,
    "allow.auto.create.topics": False,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetterTopic:
    """Where to send letters. alone: the table gets only the letters that the topic's broker refuses for their size."""

    kafka: KafkaSettings
    topic: str
    alone: bool = False


def headers(letter: DeadLetter, source: str) -> list[tuple[str, bytes]]:
    """What a reader of the topic knows of a letter, as UTF-8 text; source names the topic or log it was read from."""
    told = {
        "reason": letter.reason,
        "detail": letter.detail,
        "topic": source,
        "epoch": letter.epoch,
        "partition": letter.partition,
        "offset": letter.offset,
        "log_time_ms": letter.log_time_ms,
    }
    return [(name, str(value).encode("utf-8", "backslashreplace")) for name, value in told.items()]


class LetterSender:
    """Sends letters to a topic and waits until the broker has each of them."""

    def __init__(self, to: DeadLetterTopic, source: str) -> None:
        self._to = to
        self._source = source
        self._producer = open_producer(to.kafka)

    def send(self, letters: Sequence[DeadLetter]) -> list[DeadLetter]:
        """Send all of them; those that the broker refused for their size. Raises StoreError when one is not there."""
        outcome: list[KafkaError | None] = [None] * len(letters)

        def note(number: int) -> Callable[[KafkaError | None, Message], None]:
            def delivered(error: KafkaError | None, _message: Message) -> None:
                outcome[number] = error

            return delivered

        for number, letter in enumerate(letters):
            self._producer.produce(
                self._to.topic,
                letter.value,
                letter.key,
                headers=headers(letter, self._source),
                on_delivery=note(number),
            )
            self._producer.poll(0)
        waiting = self._producer.flush(2 * DELIVERY_WAIT_S)
        refused = [x for x, error in zip(letters, outcome, strict=True) if error is not None and too_large(error)]
        failed = [error.str() for error in outcome if error is not None and not too_large(error)]
        if failed or waiting:
            raise StoreError(
                f"{len(failed) + waiting} of {len(letters)} dead letters were not taken by topic {self._to.topic} "
                f"({failed[0] if failed else 'no answer'}); nothing of their bundle is committed: mend the topic or "
                "its cluster, then start again"
            )
        return refused


def open_producer(kafka: KafkaSettings, **more: object) -> Producer:
    """Raises InputError for settings that cannot be used."""
    options = PRODUCER_OPTIONS | {"delivery.timeout.ms": int(DELIVERY_WAIT_S * 1000)} | more
    try:
        return Producer(kafka.client() | options)
    except KafkaException as error:
        raise InputError(f"the settings of Kafka cannot be used: {error.args[0].str()}") from error


def too_large(error: KafkaError) -> bool:
    return error.code() == KafkaError.MSG_SIZE_TOO_LARGE
