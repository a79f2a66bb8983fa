"""What a source hands to the stream, and how it is told that the work is done: shared by every source.

A source (the Delta log or a Kafka topic) emits `models.event.Records`: a batch of one partition as one element,
because an element costs Beam about 35 us whatever it holds. Its position is committed through a `PositionMark`,
which Beam finalises only after the bundle, and with it every put of these records, has succeeded.
Knows nothing of events, users or rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import msgspec
from apache_beam.coders import Coder
from apache_beam.io.unbounded_source import CheckpointMark

from pipelines.held_letters import held_letters
from pipelines.metrics import process_metrics
from pipelines.worker import RowsHandle, opened_rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Slice:
    """The part of one partition to read: after_offset exclusive, until_offset inclusive, None for without end."""

    partition: int
    after_offset: int
    until_offset: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Ledger:
    """Where the positions of one checkpoint's stream over one epoch of the log are committed."""

    store: RowsHandle
    checkpoint_id: str
    epoch: int

    def commit(self, partition: int, offset: int) -> None:
        opened_rows(self.store).commit_positions(self.checkpoint_id, self.epoch, {partition: offset})


@dataclass(frozen=True, kw_only=True)
class PositionMark(CheckpointMark):
    """Everything of the partition at or below the offset has been handed out; finalised: has been put.

    Beam logs and swallows what finalize_checkpoint raises. That is safe: a position that was not committed is only
    re-read after a restart, and the rows' stamps skip what they hold. The next mark commits past it anyway.
    """

    ledger: Ledger
    partition: int
    offset: int

    def finalize_checkpoint(self) -> None:
        held_letters().commit(self.partition, self.offset, self._commit)

    def _commit(self, partition: int, offset: int) -> None:
        self.ledger.commit(partition, offset)
        process_metrics().committed(partition, offset)


class PositionCoder(Coder):
    """Marks as JSON. Deterministic, so that Beam finds the parked reader of a mark and need not open a new one."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def encode(self, value: PositionMark) -> bytes:
        return msgspec.json.encode([value.partition, value.offset])

    def decode(self, encoded: bytes) -> PositionMark:
        partition, offset = msgspec.json.decode(encoded, type=tuple[int, int])
        return PositionMark(ledger=self._ledger, partition=partition, offset=offset)

    def is_deterministic(self) -> bool:
        return True
