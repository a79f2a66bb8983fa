"""The Delta table `events` as a Beam source: an endless log, or its part up to now. No JVM; delta-rs reads it.

The table is written by the ingest, partitioned by `partition`, with table properties `vql.partitions` and
`vql.epoch`. Offsets of a log of files are dense per partition and epoch, so a missing one is a lost file and stops the
reader. Those of a Kafka topic's copy (property `vql.dense` is false) have holes, of which the longest are passed over
without being read. Files may overlap, be compacted, or hold their rows in any order: a reader takes the rows of the
next READ_AHEAD_BATCHES x batch size offsets (the per-file minima and maxima in the log say which files hold them) and
sorts them. So memory is bounded by partitions x READ_AHEAD_BATCHES x batch size, whatever the files' sizes.

The watermark stays at its minimum until the end: nothing after this source has windows or timers, late events are
as good as others (the cache's laws), and an event-time watermark over behaviours that arrive days late would lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from apache_beam.coders import Coder
from apache_beam.io.unbounded_source import UnboundedReader, UnboundedSource
from apache_beam.utils.timestamp import MAX_TIMESTAMP, MIN_TIMESTAMP, Timestamp
from deltalake import DeltaTable
from deltalake.exceptions import DeltaError, TableNotFoundError

from models.errors import InputError
from models.event import UNKNOWN_TIME, Records
from pipelines.metrics import process_metrics
from pipelines.records import Ledger, PositionCoder, PositionMark, Slice
from pipelines.worker import stop_requested

READ_AHEAD_BATCHES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Log:
    """An event log as it was when opened: `ends` holds the last offset of each partition, -1 where it is empty."""

    path: Path
    log_id: str
    epoch: int
    ends: dict[int, int]


def open_log(path: Path) -> Log:
    """Raises InputError when there is no log, or one that the ingest did not make."""
    table = _open_table(path)
    properties = table.metadata().configuration
    try:
        partitions, epoch = int(properties["vql.partitions"]), int(properties["vql.epoch"])
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{path} is no event log: its table property {error} is wrong; make it by vql ingest"
        ) from error
    return Log(
        path=path,
        log_id=str(table.metadata().id),
        epoch=epoch,
        ends={p: _end(table, epoch, p) for p in range(partitions)},
    )


@dataclass(frozen=True, kw_only=True)
class DeltaSource(UnboundedSource):
    """Slices of a log, in batches of at most batch_size records. Positions were resolved before: see `stream`."""

    path: Path
    slices: tuple[Slice, ...]
    ledger: Ledger
    batch_size: int

    def split(self, desired_num_splits: int, options: object = None) -> list[DeltaSource]:
        return [replace(self, slices=(part,)) for part in self.slices]

    def create_reader(self, options: object, checkpoint_mark: PositionMark | None) -> DeltaReader:
        (part,) = self.slices
        return DeltaReader(
            self, part if checkpoint_mark is None else replace(part, after_offset=checkpoint_mark.offset)
        )

    def get_checkpoint_mark_coder(self) -> Coder:
        return PositionCoder(self.ledger)


class DeltaReader(UnboundedReader):
    """Reads one slice in offset order; sees new versions of the table when it has read all of the old one."""

    def __init__(self, source: DeltaSource, part: Slice) -> None:
        self._source = source
        self._partition = part.partition
        self._until = part.until_offset
        self._offset = part.after_offset
        self._ahead: deque[Records] = deque()
        self._table = _open_table(source.path)
        self._load()

    def start(self) -> bool:
        return self.advance()

    def advance(self) -> bool:
        if self._finished():
            return False
        if not self._ahead:
            self._ahead.extend(self._read_ahead())
            process_metrics().log_end(self._partition, self._end)
        if not self._ahead:
            return False
        self._current = self._ahead.popleft()
        self._offset = int(self._current.offset_N[-1])
        return True

    def get_current(self) -> Records:
        return self._current

    def get_current_timestamp(self) -> Timestamp:
        return MIN_TIMESTAMP

    def get_watermark(self) -> Timestamp:
        return MAX_TIMESTAMP if self._finished() else MIN_TIMESTAMP

    def get_checkpoint_mark(self) -> PositionMark:
        return PositionMark(ledger=self._source.ledger, partition=self._partition, offset=self._offset)

    def _finished(self) -> bool:
        return stop_requested.is_set() or (self._until is not None and self._offset >= self._until)

    def _load(self) -> None:
        epoch = self._table.metadata().configuration.get("vql.epoch")
        if epoch != str(self._source.ledger.epoch):
            raise InputError(
                f"the epoch of log {self._source.path} is now {epoch}, not {self._source.ledger.epoch}; "
                "run the backfill of the new epoch, then start again"
            )
        self._dense = self._table.metadata().configuration.get("vql.dense", "true") == "true"
        self._end = _end(self._table, self._source.ledger.epoch, self._partition)
        self._files = self._table.to_pyarrow_dataset(file_pruning_predicate=[("partition", "=", str(self._partition))])

    def _refresh(self) -> None:
        version = self._table.version()
        self._table.update_incremental()
        if self._table.version() != version:
            self._load()

    def _read_ahead(self) -> Iterator[Records]:
        """The next batches, or none when the log has no more yet."""
        if self._offset >= self._end:
            self._refresh()
        self._offset, until = self._next_window()
        if until <= self._offset:
            return
        rows = self._read(until)
        if rows.num_rows:
            last, rows = int(rows["offset"][-1].as_py()), rows.filter(_names_a_user(rows))
            if not rows.num_rows:
                self._offset = last
        for start in range(0, rows.num_rows, self._source.batch_size):
            yield self._records(rows.slice(start, self._source.batch_size))

    def _next_window(self) -> tuple[int, int]:
        """The offsets to read next: after the first, up to the second. Where the log is not dense, some hold a row."""
        size = READ_AHEAD_BATCHES * self._source.batch_size
        after, last = self._offset, self._end if self._until is None else self._until
        if self._dense:
            return after, min(after + size, last)
        last, span = min(last, self._end), size
        while after < last and not self._holds_rows(after, min(after + span, last)):
            after, span = min(after + span, last), 2 * span
        while span > size and after < last:
            span //= 2
            if not self._holds_rows(after, min(after + span, last)):
                after += span
        return after, min(after + span, last)

    def _holds_rows(self, after: int, until: int) -> bool:
        with self._explained(after, until):
            return self._files.count_rows(filter=self._wanted(after, until)) > 0

    def _records(self, rows: pa.Table) -> Records:
        values = rows["value"].to_pylist()
        return Records(
            epoch=self._source.ledger.epoch,
            partition=self._partition,
            offset_N=rows["offset"].to_numpy(),
            log_time_ms_N=pc.fill_null(rows["log_time_ms"], UNKNOWN_TIME).to_numpy(),
            # The ingest checked the keys; only a tombstone says no more than its key.
            keys=_tombstone_keys(rows["user_id"]) if None in values else [None] * len(values),
            values=values,
        )

    def _read(self, until: int) -> pa.Table:
        """Every record after the position up to `until`, by offset."""
        with self._explained(self._offset, until):
            columns, wanted = ["offset", "log_time_ms", "user_id", "value"], self._wanted(self._offset, until)
            rows = self._files.to_table(columns=columns, filter=wanted).sort_by("offset")
        where = f"log {self._source.path}, partition {self._partition}"
        _check_once(rows["offset"].to_numpy(), where)
        if self._dense:
            _check_dense(rows["offset"].to_numpy(), self._offset + 1, until, where)
        return rows

    def _wanted(self, after: int, until: int) -> pc.Expression:
        offset = pc.field("offset")
        return (offset > after) & (offset <= until) & (pc.field("epoch") == self._source.ledger.epoch)

    @contextmanager
    def _explained(self, after: int, until: int) -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException, DeltaError) as error:
            raise InputError(
                f"log {self._source.path} cannot be read at partition {self._partition}, offsets {after + 1} to "
                f"{until}: {error}; restore its files, or ingest again"
            ) from error


def _names_a_user(rows: pa.Table) -> pa.ChunkedArray:
    """False for what is left of a tombstone when its user is forgotten: a place without user and value."""
    return pc.or_(pc.is_valid(rows["user_id"]), pc.is_valid(rows["value"]))


def _tombstone_keys(user_ids: pa.ChunkedArray) -> list[bytes | None]:
    return [None if user_id is None else user_id.encode() for user_id in user_ids.to_pylist()]


def _check_once(offset_N: np.ndarray, where: str) -> None:
    repeated_N = offset_N[1:][np.diff(offset_N) == 0]
    if len(repeated_N):
        raise InputError(f"{where}: offset {repeated_N[0]} is there twice; was it ingested by two programs at once?")


def _check_dense(offset_N: np.ndarray, first: int, last: int, where: str) -> None:
    missing_N = np.setdiff1d(np.arange(first, last + 1), offset_N)
    if len(missing_N):
        raise InputError(
            f"{where}: offsets from {missing_N[0]} on are missing ({len(missing_N)} of {first} to {last}); "
            "a file of the log was lost: restore it, or ingest and backfill again"
        )


def _open_table(path: Path) -> DeltaTable:
    try:
        return DeltaTable(path)
    except TableNotFoundError as error:
        raise InputError(f"there is no event log at {path}; make one by vql ingest") from error
    except (DeltaError, OSError) as error:
        raise InputError(f"the event log at {path} cannot be opened: {error}") from error


def _end(table: DeltaTable, epoch: int, partition: int) -> int:
    """The partition's last offset, from the statistics of its files; -1 when it has none."""
    files = pa.table(table.get_add_actions(flatten=True))
    if files.num_rows == 0:
        return -1
    mine = files.filter(pc.equal(files["partition.partition"], partition))
    mine = mine.filter(pc.equal(mine["max.epoch"], epoch))
    if pc.any(pc.less(mine["min.epoch"], epoch)).as_py():
        # A compaction put records of two epochs into one file, and the older ones may have the higher offsets.
        chosen = table.to_pyarrow_dataset(file_pruning_predicate=[("partition", "=", str(partition))])
        last = pc.max(chosen.to_table(columns=["offset"], filter=pc.field("epoch") == epoch)["offset"]).as_py()
    else:
        last = pc.max(mine["max.offset"]).as_py()
    return -1 if last is None else last
