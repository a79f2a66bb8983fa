"""What a topic holds, read back whole by a plain consumer."""

from __future__ import annotations

from uuid import uuid4

from confluent_kafka import OFFSET_BEGINNING, Consumer, Message, TopicPartition

from tests.kafka_broker import START_WAIT_S, Broker


def messages_of(broker: Broker, topic: str, partitions: int = 2) -> list[Message]:
    """Every record of a topic, by partition and offset."""
    consumer = Consumer({"bootstrap.servers": broker.address, "group.id": uuid4().hex, "enable.auto.commit": False})
    try:
        parts = [TopicPartition(topic, p, OFFSET_BEGINNING) for p in range(partitions)]
        wanted = sum(consumer.get_watermark_offsets(part, START_WAIT_S)[1] for part in parts)
        consumer.assign(parts)
        found: list[Message] = []
        while len(found) < wanted:
            got = consumer.consume(wanted - len(found), START_WAIT_S)
            assert got, f"{topic}: {len(found)} of {wanted} records came"
            assert all(message.error() is None for message in got)
            found += got
    finally:
        consumer.close()
    return sorted(found, key=lambda message: (message.partition(), message.offset()))
