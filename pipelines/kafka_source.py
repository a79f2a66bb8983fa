"""A Kafka topic as a Beam source: a split and a consumer per partition, whole record batches as elements.

The consumer fetches in its own threads; `advance` only takes what is there. Offsets rise but need not be dense:
compaction removes records, and transactions leave markers that nobody sees. An offset that the topic does not have
(any more) stops the reader: Kafka's automatic reset would skip records, or read them all again, without a word.

Where to go on is the row store's to say (its positions live and die with the rows); the consumer group is told as
well, because the tools that show lag look there. Nothing joins the group: partitions are assigned by the slices.
Dead letters, rows and positions know only the epoch: see `kafka_topic` for what keeps it true.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

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
from pipelines.records import Ledger, PositionCoder, PositionMark, Slice
from pipelines.worker import stop_requested

# While records are on their way, `advance` waits this long for the first of them: to say "nothing" costs a whole
# poll interval of the pipeline.
FETCH_WAIT_S = 0.1
COMMIT_WAIT_S = 1.0
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
    """The committed offsets of a consumer group without members. A commit that fails is logged: nobody starts there."""

    def __init__(self, kafka: KafkaSettings, group: str) -> None:
        self._group = group
        self._last: dict[tuple[str, int], int] = {}
        # Rejected: a consumer's commit. One that is not answered holds up the end of the process for a minute.
        self._admin = AdminClient(kafka.client())

    def commit(self, topic: str, partition: int, next_offset: int) -> None:
        if next_offset <= self._last.get((topic, partition), 0):
            return
        to = ConsumerGroupTopicPartitions(self._group, [TopicPartition(topic, partition, next_offset)])
        answer = self._admin.alter_consumer_group_offsets([to], request_timeout=COMMIT_WAIT_S)[self._group]
        try:
            (done,) = answer.result().topic_partitions
            error = done.error
        except KafkaException as raised:
            error = raised.args[0]
        if error is None:
            self._last[topic, partition] = next_offset
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

    def split(self, desired_num_splits: int, options: object = None) -> list[KafkaSource]:
        return [replace(self, slices=(part,)) for part in self.slices]

    def create_reader(self, options: object, checkpoint_mark: PositionMark | None) -> KafkaReader:
        (part,) = self.slices
        return KafkaReader(
            self, part if checkpoint_mark is None else replace(part, after_offset=checkpoint_mark.offset)
        )

    def get_checkpoint_mark_coder(self) -> Coder:
        return PositionCoder(self.ledger)


class KafkaReader(UnboundedReader):
    """Reads one slice in offset order; stops when the topic is no longer the one it was."""

    def __init__(self, source: KafkaSource, part: Slice) -> None:
        self._source = source
        self._partition = part.partition
        self._until = part.until_offset
        self._offset = part.after_offset
        self._watch = topic_watch(source.kafka, source.identity)
        self._at = TopicPartition(source.identity.name, part.partition, part.after_offset + 1)
        self._consumer = Consumer(source.kafka.client() | READER_OPTIONS | {"group.id": source.ledger.group})
        self._consumer.assign([self._at])

    def start(self) -> bool:
        return self.advance()

    def advance(self) -> bool:
        if self._finished():
            return False
        messages = self._consumer.consume(self._source.batch_size, 0)
        if not messages and self._behind():
            messages = self._consumer.consume(1, FETCH_WAIT_S)
            messages += self._consumer.consume(self._source.batch_size - 1, 0) if messages else []
        # After the fetch, so that an answer which is newer than the records speaks for them.
        self._watch.check()
        return self._take(messages)

    def get_current(self) -> Records:
        return self._current

    def get_current_timestamp(self) -> Timestamp:
        return MIN_TIMESTAMP

    def get_watermark(self) -> Timestamp:
        return MAX_TIMESTAMP if self._finished() else MIN_TIMESTAMP

    def get_checkpoint_mark(self) -> PositionMark:
        return PositionMark(ledger=self._source.ledger, partition=self._partition, offset=self._offset)

    def close(self) -> None:
        self._consumer.close()

    def _finished(self) -> bool:
        return stop_requested.is_set() or (self._until is not None and self._offset >= self._until)

    def _behind(self) -> bool:
        """Whether the partition has records that were not taken yet, as far as is known."""
        _, end = self._consumer.get_watermark_offsets(self._at, cached=True)
        return end < 0 or self._offset + 1 < end

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
