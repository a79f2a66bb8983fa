"""Who shops, and what the topic is told of it: a history of some days, then event after event while all else happens.

What was told is remembered as it was told: per user the events in their order, and since when each may be known.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
from confluent_kafka import KafkaError, Message, Producer

from models.event import Event
from tests.kafka_broker import START_WAIT_S

DAY_MS = 86_400_000
ITEMS, CATEGORIES, DAYS = 24, 3, 12
# Rankers are asked about the first; the crowd makes a backfill last long enough to be killed in its midst.
ASKED, CROWD = 120, 4_000
# Of those who are asked about: without a history at first, and for ever.
NEW, NOBODY = 15, 5
CANDIDATES = 8
PAUSE_S = 0.1


def items() -> list[dict[str, str]]:
    return [{"item_id": f"i{n}", "category": f"c{n % CATEGORIES}"} for n in range(ITEMS)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """All that a topic was told. sent_s: by time.monotonic, just before; place: partition and offset, once there."""

    events: dict[str, list[Event]] = field(default_factory=dict)
    sent_s: dict[str, list[float]] = field(default_factory=dict)
    place: dict[str, list[tuple[int, int]]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(map(len, self.events.values()))

    def at_or_below(self, user_id: str, cut: Mapping[int, int]) -> int:
        """How many of the user's events lie at or below the cut."""
        return sum(offset <= cut.get(partition, -1) for partition, offset in self.place.get(user_id, ()))

    def begin(self, event: Event) -> list[tuple[int, int]]:
        """It is about to be sent; where its place is to be added."""
        self.events.setdefault(event.user_id, []).append(event)
        self.sent_s.setdefault(event.user_id, []).append(time.monotonic())
        return self.place.setdefault(event.user_id, [])


@dataclass(frozen=True, kw_only=True)
class Shoppers:
    """Users u0, u1, ... who like one category each and are asked about, and a crowd of users who are not."""

    rng: random.Random
    begin_ms: int

    @property
    def asked(self) -> list[str]:
        return [f"u{n}" for n in range(ASKED)]

    def questions(self) -> dict[str, list[str]]:
        """The candidates that are scored for each user who is asked about; one of them is no item."""
        every = [f"i{n}" for n in range(ITEMS)]
        return {user: [*self.rng.sample(every, CANDIDATES - 1), "nothing"] for user in self.asked}

    def history(self) -> list[Event]:
        """Two events of one time a day for those who are asked about, of the crowd three in all; oldest first."""
        events = []
        for n in range(ASKED - NEW - NOBODY):
            for day in range(DAYS):
                events += self._basket(f"u{n}", n, self.begin_ms + day * DAY_MS + n * 1000, 2)
        for n in range(CROWD):
            events += self._basket(f"x{n}", n, self.begin_ms + self.rng.randrange(DAYS * DAY_MS), 3)
        return sorted(events, key=lambda event: event.event_time_ms)

    def next(self, now_ms: int) -> Event:
        """What happens now: mostly to one who is asked about; of the crowd it is told late."""
        if self.rng.random() < 0.85:
            n = self.rng.randrange(ASKED - NOBODY)
            return self._basket(f"u{n}", n, now_ms, 1)[0]
        n = self.rng.randrange(2 * CROWD)
        return self._basket(f"x{n}", n, now_ms - self.rng.randrange(DAY_MS), 1)[0]

    def _basket(self, user_id: str, taste: int, time_ms: int, count: int) -> list[Event]:
        """Of the taste, nine times of ten."""
        return [
            Event(
                event_id=f"{user_id}-{time_ms}-{n}",
                user_id=user_id,
                item_id=f"i{self._item(taste)}",
                action=self.rng.choice(["purchase", "view"]),
                event_time_ms=time_ms,
                weight=self.rng.choice([0.5, 1.0, 2.0]),
            )
            for n in range(count)
        ]

    def _item(self, taste: int) -> int:
        liked = taste % CATEGORIES if self.rng.random() < 0.9 else self.rng.randrange(CATEGORIES)
        return self.rng.randrange(ITEMS // CATEGORIES) * CATEGORIES + liked


class Telling:
    """Tells the topic what happens, in a thread of its own from `start` to `end`."""

    def __init__(self, address: str, topic: str, shoppers: Shoppers) -> None:
        self.told = Told()
        self.shoppers, self._topic = shoppers, topic
        # Idempotence keeps a user's events in the order in which they were sent.
        self._producer = Producer({"bootstrap.servers": address, "enable.idempotence": True, "linger.ms": 5})
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="telling")
        self._failed: list[KafkaError] = []

    def tell(self, events: Sequence[Event]) -> None:
        """Returns when all are there."""
        for event in events:
            self._send(event)
            self._producer.poll(0)
        self._flush()

    def start(self) -> None:
        self._thread.start()

    def end(self) -> None:
        self._stop.set()
        if self._thread.is_alive():
            self._thread.join()
        self._flush()

    def _run(self) -> None:
        for now_ms in _rising():
            if self._stop.wait(PAUSE_S):
                return
            self._send(self.shoppers.next(now_ms))
            self._producer.poll(0)

    def _send(self, event: Event) -> None:
        places = self.told.begin(event)

        def there(error: KafkaError | None, message: Message) -> None:
            if error is not None:
                self._failed.append(error)
                return
            partition, offset = message.partition(), message.offset()
            assert partition is not None
            assert offset is not None
            places.append((partition, offset))

        self._producer.produce(self._topic, msgspec.json.encode(event), event.user_id, on_delivery=there)

    def _flush(self) -> None:
        assert self._producer.flush(START_WAIT_S) == 0, f"topic {self._topic} did not take all events"
        assert self._failed == []


def _rising() -> Iterator[int]:
    """The clock's milliseconds, no one twice."""
    last_ms = 0
    while True:
        last_ms = max(last_ms + 1, int(time.time() * 1000))
        yield last_ms
