"""A user in a Kafka topic: the tombstone that erases what came before it, and what the topic still holds of one.

The partition must be the user's own. Where it is not known, librdkafka's partitioner chooses, as it does for producers.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from uuid import uuid4

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource

from models.errors import InputError, StoreError
from models.forgotten import mentions
from pipelines.dead_letter_topic import DELIVERY_WAIT_S, open_producer
from pipelines.kafka_topic import KafkaLog, open_topic

POLL_S = 1.0
SETTINGS = ("cleanup.policy", "retention.ms", "delete.retention.ms")


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Records of one user in one partition: how many, the last one's offset and its own time (Unix ms)."""

    partition: int
    records: int
    last_offset: int
    last_time_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicOfUsers:
    """The topic that a log is the copy of."""

    source: KafkaLog

    @property
    def name(self) -> str:
        return self.source.topic

    @property
    def epoch(self) -> int:
        return self.source.epoch

    @property
    def partitions(self) -> int:
        return len(open_topic(self.source).ends)

    def place_tombstone(self, user_id: str, partition: int | None) -> tuple[int, int]:
        """Produce it; its partition and offset. Raises StoreError when the topic may not have it."""
        open_topic(self.source)  # an absent topic is an error here, and not one of time
        producer = open_producer(self.source.kafka, **{"enable.idempotence": True})
        placed: list[tuple[KafkaError | None, Message]] = []
        producer.produce(
            self.name,
            value=None,
            key=user_id.encode(),
            partition=-1 if partition is None else partition,
            on_delivery=lambda error, message: placed.append((error, message)),
        )
        producer.flush(2 * DELIVERY_WAIT_S)
        if not placed or placed[0][0] is not None:
            said = placed[0][0].str() if placed and placed[0][0] is not None else "no answer"
            raise StoreError(f"topic {self.name} did not take the tombstone ({said}); run this again")
        found, at = placed[0][1].partition(), placed[0][1].offset()
        assert found is not None, "a delivered record has its place"
        assert at is not None, "a delivered record has its place"
        return found, at

    def settings(self) -> dict[str, str]:
        """What decides how long the topic keeps records."""
        asked = ConfigResource(ConfigResource.Type.TOPIC, self.name)
        # Named: a client that is collected takes its questions with it.
        admin = AdminClient(self.source.kafka.client())
        found = admin.describe_configs([asked])[asked]
        try:
            told = found.result(self.source.kafka.timeout_s)
        except KafkaException as error:
            raise InputError(f"the settings of topic {self.name} cannot be read: {error.args[0].str()}") from error
        return {name: told[name].value for name in SETTINGS}

    def held(self, user_id: str) -> list[Held]:
        """What the topic holds of a user, by reading all of it up to its end as of now."""
        found: dict[int, Held] = {}
        for message in self._records():
            partition, offset = message.partition(), message.offset()
            key, value = message.key(), message.value()
            assert partition is not None, "a record that was read has its place"
            assert offset is not None, "a record that was read has its place"
            if mentions(user_id, key, value):
                before = found[partition].records if partition in found else 0
                found[partition] = Held(
                    partition=partition,
                    records=before + 1,
                    last_offset=offset,
                    last_time_ms=message.timestamp()[1],
                )
        return sorted(found.values(), key=lambda held: held.partition)

    def _records(self) -> Iterator[Message]:
        opened = open_topic(self.source)
        options = {"group.id": f"vql-forget-{uuid4().hex}", "enable.auto.commit": False, "enable.partition.eof": True}
        # What an aborted transaction left is data of the user as well.
        more = {"isolation.level": "read_uncommitted", "auto.offset.reset": "earliest"}
        consumer = Consumer(self.source.kafka.client() | options | more)
        open_partitions = {p for p, end in opened.ends.items() if end >= opened.begins[p]}
        consumer.assign([TopicPartition(self.name, p, opened.begins[p]) for p in opened.ends])
        answered_s = time.monotonic()
        try:
            while open_partitions:
                message = consumer.poll(POLL_S)
                if message is None:
                    if time.monotonic() - answered_s > DELIVERY_WAIT_S:
                        raise InputError(f"topic {self.name} is not read to its end: Kafka does not answer")
                    continue
                answered_s = time.monotonic()
                error = message.error()
                if error is None:
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    open_partitions.discard(message.partition())
                else:
                    raise InputError(f"topic {self.name} cannot be read: {error.str()}")
        finally:
            consumer.close()
