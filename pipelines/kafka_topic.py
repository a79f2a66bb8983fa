"""A Kafka topic as a log: which one it is, what it holds, and where a stream starts in it.

A topic's name says little: a topic that was deleted and made again, or given more partitions, holds other records
at the same positions, and Kafka's client goes on in it without a word. So a topic is known by its id and its number
of partitions, and whoever reads it watches that they stay what they were.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec, TopicDescription

from feature_repo.store import Backfill
from models.errors import InputError, StoreError
from pipelines.kafka_settings import KafkaSettings
from pipelines.positions import known_positions

WATCH_INTERVAL_S = 1.0
_LEADERLESS = (KafkaError.NOT_LEADER_FOR_PARTITION, KafkaError.LEADER_NOT_AVAILABLE)
_URL_SAFE = str.maketrans("+/", "-_")
Start = Literal["resume", "earliest", "latest"] | Mapping[int, int]


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicIdentity:
    """Which topic of a name it is; positions in another one mean other records."""

    name: str
    topic_id: str
    partitions: int

    def refuse_another(self, found: TopicIdentity) -> None:
        """Raises StoreError when the topic of this name is not the one that the rows were made from."""
        if found != self:
            raise StoreError(
                f"topic {self.name} is not the one that the rows were made from: it has id {found.topic_id} and "
                f"{found.partitions} partitions, theirs had id {self.topic_id} and {self.partitions}; it was created "
                "again or re-partitioned: raise the epoch, ingest it and run vql backfill"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class Topic:
    """A topic as it was when opened.

    `begins`: the first offset that each partition still has; `ends`: its last readable one (of committed
    transactions), one below `begins` where it is empty.
    """

    kafka: KafkaSettings
    identity: TopicIdentity
    epoch: int
    begins: dict[int, int]
    ends: dict[int, int]

    @property
    def path(self) -> str:
        """What messages call it, as they do a log of files."""
        return f"kafka://{self.kafka.bootstrap_servers}/{self.identity.name}"


@dataclass(frozen=True, kw_only=True, slots=True)
class KafkaLog:
    """Which topic to read, and its epoch: raised by one whenever the topic is created again or re-partitioned."""

    kafka: KafkaSettings
    topic: str
    epoch: int = 1


def open_topic(log: KafkaLog) -> Topic:
    """Raises InputError for a topic that does not exist, and for a cluster that does not answer in timeout_s."""
    asked = _Asked(log.kafka)
    description = asked.answer(describe(asked.admin, log.topic, log.kafka.timeout_s))
    partitions = [partition.id for partition in description.partitions]
    return Topic(
        kafka=log.kafka,
        identity=_identity(description),
        epoch=log.epoch,
        begins=asked.offsets(log.topic, partitions, OffsetSpec.earliest()),
        ends={p: offset - 1 for p, offset in asked.offsets(log.topic, partitions, OffsetSpec.latest()).items()},
    )


def topic_positions(
    topic: Topic, committed: Mapping[int, tuple[int, int]], backfill: Backfill | None, start: Start
) -> dict[int, int]:
    """The offset after which each partition is to be read.

    "resume": at what is known to be in the rows (see known_positions). "earliest": at the first record there is.
    "latest": as "resume", and at the end where nothing is known, which gives up what came before. A mapping: at the
    offset named for a partition, as "resume" for the others.
    Raises StoreError where nothing is known or a start would leave a hole, InputError for offsets out of range and
    for records that the rows still need but the topic no longer has.
    """
    known = known_positions(topic, committed, backfill)
    told = _told(topic, known, start)
    missing = sorted(set(topic.ends) - set(told))
    if missing:
        raise StoreError(
            f"partitions {missing} of {topic.path} were never backfilled; run vql backfill, or say where to start: "
            "--from earliest, latest or PARTITION=OFFSET"
        )
    for partition, offset in told.items():
        first = topic.begins[partition]
        if min(offset, known.get(partition, offset)) < first - 1:
            raise InputError(lost_records(topic.path, partition, min(offset, known.get(partition, offset)) + 1, first))
        if offset > known.get(partition, offset):
            raise StoreError(
                f"the rows hold partition {partition} up to offset {known[partition]}; a start at {offset + 1} would "
                "leave a hole that nothing shows: start at or before it, or run vql backfill up to there"
            )
    return told


def lost_records(path: str, partition: int, wanted: int, first: int | None) -> str:
    """What to say when a partition no longer has, or never had, the offset that is to be read next."""
    has = "" if first is None else f"; it begins at {first}"
    return (
        f"{path}, partition {partition}: offset {wanted} is out of range{has}. Retention deleted records before they "
        "were folded, or the topic was created again. Nothing was skipped: run vql backfill over the Delta log, which "
        "keeps them, then start again at its cut"
    )


class TopicWatch:
    """Tells when a topic is no longer the one it was, without making its caller wait.

    It asks the cluster every WATCH_INTERVAL_S and looks at the answer the next time it is called. A cluster that does
    not answer is asked again: that the topic cannot be seen says nothing about it.
    """

    def __init__(self, kafka: KafkaSettings, identity: TopicIdentity) -> None:
        self._kafka = kafka
        self._identity = identity
        self._admin = _admin(kafka)
        self._answer: Future[TopicDescription] | None = None
        self._asked_s = 0.0

    def check(self) -> None:
        """Raises StoreError for another topic of the name, InputError when there is none any more."""
        self._admin.poll(0)
        if self._answer is None:
            if time.monotonic() - self._asked_s >= WATCH_INTERVAL_S:
                self._asked_s = time.monotonic()
                self._answer = describe(self._admin, self._identity.name, self._kafka.timeout_s)
        elif self._answer.done():
            answer, self._answer = self._answer, None
            self._look_at(answer)

    def _look_at(self, answer: Future[TopicDescription]) -> None:
        error = answer.exception()
        if error is None:
            self._identity.refuse_another(_identity(answer.result()))
        elif isinstance(error, KafkaException) and error.args[0].code() == KafkaError.UNKNOWN_TOPIC_OR_PART:
            raise InputError(f"topic {self._identity.name} was deleted while it was read: {error.args[0].str()}")


@lru_cache(maxsize=8)
def topic_watch(kafka: KafkaSettings, identity: TopicIdentity) -> TopicWatch:
    """The watch of this process."""
    return TopicWatch(kafka, identity)


def describe(admin: AdminClient, name: str, timeout_s: float) -> Future[TopicDescription]:
    return admin.describe_topics(TopicCollection([name]), request_timeout=timeout_s)[name]


def _told(topic: Topic, known: Mapping[int, int], start: Start) -> dict[int, int]:
    if isinstance(start, Mapping):
        return dict(known) | {p: _in_range(topic, p, offset) - 1 for p, offset in start.items()}
    if start == "earliest":
        return {partition: first - 1 for partition, first in topic.begins.items()}
    return (dict(topic.ends) if start == "latest" else {}) | dict(known)


def _in_range(topic: Topic, partition: int, offset: int) -> int:
    if partition not in topic.ends:
        raise InputError(f"{topic.path} has no partition {partition}; it has 0 to {len(topic.ends) - 1}")
    first, last = topic.begins[partition], topic.ends[partition] + 1
    if not first <= offset <= last:
        raise InputError(f"{topic.path}, partition {partition}: a start at {offset} is not within {first} to {last}")
    return offset


def _identity(description: TopicDescription) -> TopicIdentity:
    # As Kafka's own tools spell it: the client's spelling may have a slash, and folders are named by the id.
    topic_id = str(description.topic_id).translate(_URL_SAFE)
    return TopicIdentity(name=description.name, topic_id=topic_id, partitions=len(description.partitions))


def _admin(kafka: KafkaSettings, **more: Any) -> AdminClient:
    try:
        return AdminClient(kafka.client() | more)
    except KafkaException as error:
        raise InputError(f"the settings of Kafka cannot be used: {error.args[0].str()}") from error


class _Asked:
    """Questions to a cluster whose answers are waited for."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._said: list[str] = []
        # What the client has to say is in the error that is raised; in the log it would stand there twenty times.
        self.admin = _admin(kafka, log_level=0, error_cb=lambda error: self._said.append(error.str()))

    def answer(self, future: Future[Any]) -> Any:
        # The client's own time-out is about one request; this one bounds everything before it as well.
        deadline_s = time.monotonic() + self._kafka.timeout_s
        while not future.done() and time.monotonic() < deadline_s:
            self.admin.poll(0.02)
        where = f"Kafka at {self._kafka.bootstrap_servers}"
        try:
            return future.result(0)
        except (TimeoutError, KafkaException) as error:
            code = error.args[0].code() if isinstance(error, KafkaException) else None
            if code == KafkaError.UNKNOWN_TOPIC_OR_PART:
                raise InputError(
                    f"{where} has no such topic ({error.args[0].str()}); create it, or check its name"
                ) from error
            said = self._said[0] if self._said else error.args[0].str() if code is not None else "no answer"
            raise InputError(
                f"{where} cannot be used ({said}; waited {self._kafka.timeout_s:g} s); check the address, the network "
                "and the security settings"
            ) from error

    def offsets(self, name: str, partitions: list[int], which: OffsetSpec) -> dict[int, int]:
        deadline_s = time.monotonic() + self._kafka.timeout_s
        while True:
            futures = self.admin.list_offsets(
                {TopicPartition(name, partition): which for partition in partitions},
                isolation_level=IsolationLevel.READ_COMMITTED,
                request_timeout=self._kafka.timeout_s,
            )
            try:
                found = {asked.partition: self.answer(future).offset for asked, future in futures.items()}
                return dict(sorted(found.items()))
            except InputError as error:
                # A partition that is between two leaders has one again in a moment.
                cause = error.__cause__
                leaderless = isinstance(cause, KafkaException) and cause.args[0].code() in _LEADERLESS
                if not leaderless or time.monotonic() > deadline_s:
                    raise
                time.sleep(0.1)
