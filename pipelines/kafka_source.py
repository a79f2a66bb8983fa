"""A Kafka topic as a Beam source: a split and a consumer per partition, whole record batches as elements.

The consumer fetches in its own threads; `advance` only takes what is there, and gives way to the other partitions
when that was less than a batch: the in-process runner reads one after another, and the others' records would wait.
Offsets rise but need not be dense: compaction removes records, and transactions leave markers that nobody sees. An
offset that the topic does not have (any more) stops the reader: Kafka's automatic reset would skip records, or read
them all again, without a word.

Where to go on is the row store's to say (its positions live and die with the rows); the consumer group is told as
well, because the tools that show lag look there. Nothing joins the group: partitions are assigned by the slices.
Dead letters, rows and positions know only the epoch: see `kafka_topic` for what keeps it true.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from weakref import WeakSet

import numpy as np
import structlog
from apache_beam.coders import Coder
from apache_beam.io.unbounded_source import UnboundedReader, UnboundedSource
from apache_beam.utils.timestamp import MAX_TIMESTAMP, MIN_TIMESTAMP, Timestamp
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Message,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient

from models.errors import InputError
from models.event import UNKNOWN_TIME, Records
from pipelines.kafka_settings import KafkaSettings
from pipelines.kafka_topic import Topic, TopicIdentity, lost_records, topic_watch
from pipelines.metrics import process_metrics
from pipelines.records import Ledger, PositionCoder, PositionMark, Slice
from pipelines.worker import stop_requested

# How long the readers of a process wait together, in turns, while none of them has records: for those that are on
# their way, and for new ones. To say "nothing" costs a poll interval of the pipeline, except on the in-process runner,
# which calls an idle reader again at once: without a wait its idle stream is a busy one.
FETCH_WAIT_S = 0.1
IDLE_WAIT_S = 0.04
COMMIT_WAIT_S = 1.0
COMMIT_INTERVAL_S = 1.0
READER_OPTIONS = {
    "enable.auto.commit": False,
    "enable.auto.offset.store": False,
    "auto.offset.reset": "error",
    "isolation.level": "read_committed",
    "allow.auto.create.topics": False,
    # The only news of an end behind which compaction or a transaction left no record.
    "enable.partition.eof": True,
    "fetch.wait.max.ms": 100,
    # Memory per partition, and how soon a reader that was that far ahead fetches again.
    "queued.max.messages.kbytes": 16_384,
    "fetch.queue.backoff.ms": 20,
    "statistics.interval.ms": 5_000,
}
_OUT_OF_RANGE = (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE)


@dataclass(frozen=True, kw_only=True, slots=True)
class KafkaLedger:
    """Commits positions to the row store, which is the truth, and then to the consumer group, for tools."""

    rows: Ledger
    kafka: KafkaSettings
    topic: str
    group: str

    @property
    def epoch(self) -> int:
        return self.rows.epoch

    def commit(self, partition: int, offset: int) -> None:
        self.rows.commit(partition, offset)
        group_offsets(self.kafka, self.group).commit(self.topic, partition, offset + 1)


class GroupOffsets:
    """The committed offsets of a consumer group without members. A commit that fails is logged: nobody starts there.

    A partition's are told once in COMMIT_INTERVAL_S, which is enough for tools; `flush` tells what was held back.
    """

    def __init__(self, kafka: KafkaSettings, group: str) -> None:
        self._group = group
        self._told: dict[tuple[str, int], int] = {}
        self._held: dict[tuple[str, int], int] = {}
        self._tried_s: dict[tuple[str, int], float] = {}
        # Rejected: a consumer's commit. One that is not answered holds up the end of the process for a minute.
        self._admin = AdminClient(kafka.client())

    def commit(self, topic: str, partition: int, next_offset: int) -> None:
        place = (topic, partition)
        if next_offset <= self._told.get(place, 0):
            return
        self._held[place] = next_offset
        if time.monotonic() - self._tried_s.get(place, -COMMIT_INTERVAL_S) >= COMMIT_INTERVAL_S:
            self._tell(place)

    def flush(self) -> None:
        for place in list(self._held):
            self._tell(place)

    def _tell(self, place: tuple[str, int]) -> None:
        self._tried_s[place] = time.monotonic()
        to = ConsumerGroupTopicPartitions(self._group, [TopicPartition(*place, self._held[place])])
        answer = self._admin.alter_consumer_group_offsets([to], request_timeout=COMMIT_WAIT_S)[self._group]
        try:
            (done,) = answer.result().topic_partitions
            error = done.error
        except KafkaException as raised:
            error = raised.args[0]
        if error is None:
            self._told[place] = self._held.pop(place)
        else:
            structlog.get_logger().warning("group offsets not committed", group=self._group, error=error.str())
        self._admin.poll(0)


@lru_cache(maxsize=8)
def group_offsets(kafka: KafkaSettings, group: str) -> GroupOffsets:
    """The committer of this process."""
    return GroupOffsets(kafka, group)


@dataclass(frozen=True, kw_only=True)
class KafkaSource(UnboundedSource):
    """Slices of a topic, in batches of at most batch_size records. Positions were resolved before: see `stream`."""

    kafka: KafkaSettings
    identity: TopicIdentity
    slices: tuple[Slice, ...]
    ledger: KafkaLedger
    batch_size: int

    @classmethod
    def of(cls, topic: Topic, slices: tuple[Slice, ...], rows: Ledger, batch_size: int) -> KafkaSource:
        """The source for an opened topic; its positions are committed to the rows' ledger and to a group."""
        group = f"vql-{rows.checkpoint_id}"
        ledger = KafkaLedger(rows=rows, kafka=topic.kafka, topic=topic.identity.name, group=group)
        return cls(kafka=topic.kafka, identity=topic.identity, slices=slices, ledger=ledger, batch_size=batch_size)

    def close(self) -> None:
        """After the last commit of this process: the group's offsets are what the rows' are."""
        group_offsets(self.kafka, self.ledger.group).flush()

    def split(self, desired_num_splits: int, options: object = None) -> list[KafkaSource]:
        return [replace(self, slices=(part,)) for part in self.slices]

    def create_reader(self, options: object, checkpoint_mark: PositionMark | None) -> KafkaReader:
        (part,) = self.slices
        return KafkaReader(
            self, part if checkpoint_mark is None else replace(part, after_offset=checkpoint_mark.offset)
        )

    def get_checkpoint_mark_coder(self) -> Coder:
        return PositionCoder(self.ledger)


class Turns:
    """How the readers of a process share its time: whoever has given all that was there lets the others go on."""

    def __init__(self) -> None:
        # Weakly held: a runner that fails drops its readers without closing them.
        self._readers: WeakSet[object] = WeakSet()
        self._idle_in_a_row = 0

    def join(self, reader: object) -> None:
        self._readers.add(reader)

    def leave(self, reader: object) -> None:
        self._readers.discard(reader)

    def note(self, found: bool) -> None:
        self._idle_in_a_row = 0 if found else self._idle_in_a_row + 1

    def wait_s(self, behind: bool) -> float:
        """How long a reader without records waits for some: not at all while another one has any."""
        readers = len(self._readers)
        others_idle = self._idle_in_a_row >= readers - 1
        return (FETCH_WAIT_S if behind else IDLE_WAIT_S) / readers if others_idle else 0.0


@lru_cache(maxsize=1)
def process_turns() -> Turns:
    """The turns of this process."""
    return Turns()


class KafkaReader(UnboundedReader):
    """Reads one slice in offset order; stops when the topic is no longer the one it was."""

    def __init__(self, source: KafkaSource, part: Slice) -> None:
        self._source = source
        self._partition = part.partition
        self._until = part.until_offset
        self._offset = part.after_offset
        self._metrics = process_metrics()
        self._watch = topic_watch(source.kafka, source.identity)
        self._at = TopicPartition(source.identity.name, part.partition, part.after_offset + 1)
        own = {"group.id": source.ledger.group, "stats_cb": partial(self._metrics.kafka_statistics, part.partition)}
        self._consumer = Consumer(source.kafka.client() | READER_OPTIONS | own)
        self._consumer.assign([self._at])
        self._turns = process_turns()
        self._turns.join(self)
        self._gave_all = False

    def start(self) -> bool:
        return self.advance()

    def advance(self) -> bool:
        if self._finished():
            return False
        if self._gave_all:
            self._gave_all = False
            return False
        size = self._source.batch_size
        messages = self._consumer.consume(size, 0)
        if not messages and (wait_s := self._turns.wait_s(self._behind())):
            messages = self._consumer.consume(1, wait_s)
            messages += self._consumer.consume(size - 1, 0) if messages else []
        # After the fetch, so that an answer which is newer than the records speaks for them.
        self._watch.check()
        if (end := self._end()) >= 0:
            self._metrics.log_end(self._partition, end - 1)
        found = self._take(messages)
        self._turns.note(found)
        self._gave_all = found and len(messages) < size and not self._finished()
        return found

    def get_current(self) -> Records:
        return self._current

    def get_current_timestamp(self) -> Timestamp:
        return MIN_TIMESTAMP

    def get_watermark(self) -> Timestamp:
        return MAX_TIMESTAMP if self._finished() else MIN_TIMESTAMP

    def get_checkpoint_mark(self) -> PositionMark:
        return PositionMark(ledger=self._source.ledger, partition=self._partition, offset=self._offset)

    def close(self) -> None:
        self._turns.leave(self)
        self._consumer.close()

    def _finished(self) -> bool:
        return stop_requested.is_set() or (self._until is not None and self._offset >= self._until)

    def _behind(self) -> bool:
        """Whether the partition has records that were not taken yet, as far as is known."""
        end = self._end()
        return end < 0 or self._offset + 1 < end

    def _end(self) -> int:
        """The offset behind the partition's last record as the client knows it; negative before it does."""
        return self._consumer.get_watermark_offsets(self._at, cached=True)[1]

    def _take(self, messages: list[Message]) -> bool:
        """Make the messages the current records; False when there are none among them."""
        passed = self._offset
        for message in messages:
            if message.error() is not None:
                passed = max(passed, self._end_told_by(message))
        good = [message for message in messages if message.error() is None]
        offset_N = np.fromiter((message.offset() for message in good), np.int64, len(good))
        count = len(good) if self._until is None else int(np.searchsorted(offset_N, self._until, "right"))
        passed = max(passed, int(offset_N[-1]) if len(good) else -1)
        self._offset = passed if self._until is None else min(passed, self._until)
        if count == 0:
            return False
        good = good[:count]
        times = (message.timestamp() for message in good)
        self._current = Records(
            epoch=self._source.ledger.epoch,
            partition=self._partition,
            offset_N=offset_N[:count],
            log_time_ms_N=np.fromiter((ms if kind else UNKNOWN_TIME for kind, ms in times), np.int64, count),
            keys=[message.key() for message in good],
            values=[message.value() for message in good],
        )
        return True

    def _end_told_by(self, message: Message) -> int:
        """The offset up to which everything was read, when that is what the message says; else it is an error."""
        error = message.error()
        if error.code() == KafkaError._PARTITION_EOF:
            return message.offset() - 1
        name, address = self._source.identity.name, self._source.kafka.bootstrap_servers
        if error.code() in _OUT_OF_RANGE:
            raise InputError(lost_records(f"kafka://{address}/{name}", self._partition, self._offset + 1, None))
        raise InputError(f"kafka://{address}/{name}, partition {self._partition}, cannot be read: {error.str()}")
