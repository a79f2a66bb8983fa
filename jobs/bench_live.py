"""Events at a steady rate into a running stream, and how soon their rows can be read: freshness as a reader sees it.

Some events are probes: the broker says at which position each lies, and a watcher asks Redis for the stamps of their
users' rows until each one covers it. The time is from the call that produces the event to the answer with the stamp,
both by one clock; it is up to a poll (POLL_S) too long.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import psutil
from confluent_kafka import KafkaError, Message, Producer

from feature_repo.redis_store import row_key, unpacked_stamp
from jobs.bench_load import Traffic, produce_in_turn
from jobs.local_servers import KafkaServer, RedisServer

PROBES_PER_S = 50
POLL_S = 0.01
TICK_S = 0.02
# How long probes may stay out of sight after the last event, before they count as never seen.
PATIENCE_S = 60.0
RSS_INTERVAL_S = 0.5
Told = Callable[[KafkaError | None, Message], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """An event whose row is watched, at its place in the log."""

    user_id: str
    partition: int
    offset: int
    produced_s: float


@dataclass(kw_only=True, slots=True)
class Seen:
    """Seconds from event to visible row of each probe, those never seen left out, and how fast events really came."""

    latency_s: list[float] = field(default_factory=list)
    lost: int = 0
    events_per_s: float = 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """Where events go, and where the rows of a checkpoint are."""

    kafka: KafkaServer
    redis: RedisServer
    topic: str
    checkpoint_id: str
    epoch: int = 1


def offer(site: Site, traffic: Traffic, events_per_s: float, seconds: float) -> Seen:
    """Produce events at this rate for so long, and watch the probes among them until all are seen."""
    watcher = _Watcher(site)
    thread = threading.Thread(target=watcher.run, name="watcher", daemon=True)
    thread.start()
    sent = _produce(site, traffic, events_per_s, seconds, watcher.add)
    watcher.end_after(PATIENCE_S)
    thread.join()
    watcher.seen.events_per_s = sent / seconds
    return watcher.seen


def _produce(site: Site, traffic: Traffic, events_per_s: float, seconds: float, probed: Callable[[Probe], None]) -> int:
    """How many events were sent: as many as were due at the end of the time, late ones at once."""
    producer = Producer({"bootstrap.servers": site.kafka.address, "linger.ms": 2})
    every = max(1, round(events_per_s / PROBES_PER_S))
    started_s, sent = time.monotonic(), 0
    while (passed_s := time.monotonic() - started_s) < seconds:
        due = int(passed_s * events_per_s) - sent
        for key, value in traffic.draw(due, int(time.time() * 1000)):
            told = _placed(probed, key.decode(), time.monotonic()) if sent % every == 0 else None
            produce_in_turn(producer, site.topic, value, key, **({} if told is None else {"on_delivery": told}))
            sent += 1
        producer.poll(0)
        time.sleep(TICK_S)
    producer.flush(PATIENCE_S)
    return sent


def _placed(probed: Callable[[Probe], None], user_id: str, now_s: float) -> Told:
    def told(error: KafkaError | None, message: Message) -> None:
        if error is None:
            place = {"partition": message.partition(), "offset": message.offset()}
            probed(Probe(user_id=user_id, produced_s=now_s, **place))

    return told


class _Watcher:
    """Polls the stamps of the probes' rows."""

    def __init__(self, site: Site) -> None:
        self.seen = Seen()
        self._site = site
        self._new: list[Probe] = []
        self._deadline_s = float("inf")

    def add(self, probe: Probe) -> None:
        self._new.append(probe)

    def end_after(self, patience_s: float) -> None:
        self._deadline_s = time.monotonic() + patience_s

    def run(self) -> None:
        waiting: list[Probe] = []
        with self._site.redis.client() as client:
            while True:
                last = self._deadline_s < float("inf")
                waiting, self._new = waiting + self._new, []
                waiting = list(self._ask(client, waiting))
                if (last and not waiting and not self._new) or time.monotonic() > self._deadline_s:
                    self.seen.lost = len(waiting)
                    return
                time.sleep(POLL_S)

    def _ask(self, client, waiting: list[Probe]) -> Iterator[Probe]:
        """Those that are still not seen."""
        pipeline = client.pipeline(transaction=False)
        for probe in waiting:
            pipeline.hget(row_key(self._site.checkpoint_id, probe.user_id), "s")
        stamps = pipeline.execute()
        now_s = time.monotonic()
        for probe, stored in zip(waiting, stamps, strict=True):
            if stored is not None and unpacked_stamp(stored).covers(self._site.epoch, probe.offset):
                self.seen.latency_s.append(now_s - probe.produced_s)
            else:
                yield probe


@contextmanager
def resident_mb(pid: int) -> Iterator[list[float]]:
    """The resident memory of a process (MiB), every RSS_INTERVAL_S while the context lasts."""
    sampled_mb, ended, process = [], threading.Event(), psutil.Process(pid)

    def sample() -> None:
        while True:
            sampled_mb.append(process.memory_info().rss / 2**20)
            if ended.wait(RSS_INTERVAL_S):
                return

    thread = threading.Thread(target=sample, name="memory", daemon=True)
    thread.start()
    try:
        yield sampled_mb
    finally:
        ended.set()
        thread.join()


def percentile_s(latency_s: list[float], percent: float) -> float:
    return float(np.percentile(latency_s, percent)) if latency_s else float("inf")
