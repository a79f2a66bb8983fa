"""Two topics that differ by their poison alone: at its positions, the control has events of a user of its own.

So every other user's events have the same offsets in both, and their rows are to be equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from confluent_kafka import Producer

from models.event import Event
from pipelines.poison import USER, Poison
from tests.kafka_broker import START_WAIT_S, Broker
from tests.pipelines.small_log import partition_of
from tests.small import START_MS

LARGE_TOPIC = {"max.message.bytes": "20000000"}
# Enough for the decoys: the events of `random_events` spread over a day or two.
LOG_TIME_MS = START_MS + 30 * 86_400_000


@dataclass(frozen=True, kw_only=True, slots=True)
class Placed:
    """A record on its way to a partition; poison: what is bad about it, None for a sound event."""

    partition: int
    key: bytes | None
    value: bytes | None
    log_time_ms: int
    poison: Poison | None = None


def with_poison(events: Sequence[Event], poison: Sequence[Poison], seed: int = 0) -> list[Placed]:
    """The events in their order with the poison between them, in both partitions."""
    rng = np.random.default_rng(seed)
    mixed = [_sound(event) for event in events]
    for number, bad in enumerate(poison):
        placed = Placed(partition=number % 2, key=bad.key, value=bad.value, log_time_ms=bad.log_time_ms, poison=bad)
        mixed.insert(int(rng.integers(0, len(mixed) + 1)), placed)
    return mixed


def control(mixed: Sequence[Placed]) -> list[Placed]:
    """The same with a sound event of another user in each poison's place."""
    return [record if record.poison is None else _decoy(record.partition, n) for n, record in enumerate(mixed)]


def produce(broker: Broker, topic: str, records: Sequence[Placed]) -> list[tuple[int, int]]:
    """Append the records with their own timestamps; the partition and offset of each."""
    producer = Producer({"bootstrap.servers": broker.address, "message.max.bytes": 20_000_000, "linger.ms": 5})
    ends = [0, 0]
    places = []
    for record in records:
        producer.produce(topic, record.value, record.key, record.partition, timestamp=record.log_time_ms)
        places.append((record.partition, ends[record.partition]))
        ends[record.partition] += 1
        producer.poll(0)
    assert producer.flush(START_WAIT_S) == 0
    return places


def _sound(event: Event) -> Placed:
    key, value = event.user_id.encode(), msgspec.json.encode(event)
    return Placed(partition=partition_of(event), key=key, value=value, log_time_ms=LOG_TIME_MS)


def _decoy(partition: int, number: int) -> Placed:
    event = Event(
        event_id=f"d{number}", user_id=f"{USER}-{partition}", item_id="i1", action="view", event_time_ms=START_MS
    )
    return Placed(
        partition=partition, key=event.user_id.encode(), value=msgspec.json.encode(event), log_time_ms=LOG_TIME_MS
    )
