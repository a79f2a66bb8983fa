"""The Delta table `events` as a Beam source: an endless log, or its part up to now. No JVM; delta-rs reads it.

The table is written by the ingest, partitioned by `partition`, with table properties `vql.partitions` and
`vql.epoch`. Offsets are dense per partition and epoch, so a missing one is a lost file and stops the reader.
Files may overlap, be compacted, or hold their rows in any order: a reader takes the next READ_AHEAD_BATCHES batches
by offset (the per-file minima and maxima in the log say which files hold them), sorts them and checks that they are
dense. So memory is bounded by partitions x READ_AHEAD_BATCHES x batch size, whatever the files' sizes.

The watermark stays at its minimum until the end: nothing after this source has windows or timers, late events are
as good as others (the cache's laws), and an event-time watermark over behaviours that arrive days late would lie.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
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
        until = min(
            self._offset + READ_AHEAD_BATCHES * self._source.batch_size,
            self._end if self._until is None else self._until,
        )
        if until <= self._offset:
            return
        rows = self._read(until)
        for start in range(0, rows.num_rows, self._source.batch_size):
            yield self._records(rows.slice(start, self._source.batch_size))

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
        offset, epoch = pc.field("offset"), self._source.ledger.epoch
        wanted = (offset > self._offset) & (offset <= until) & (pc.field("epoch") == epoch)
        try:
            rows = self._files.to_table(columns=["offset", "log_time_ms", "user_id", "value"], filter=wanted)
        except (OSError, pa.ArrowException, DeltaError) as error:
            raise InputError(
                f"log {self._source.path} cannot be read at partition {self._partition}, offsets {self._offset + 1} to "
                f"{until}: {error}; restore its files, or ingest again"
            ) from error
        rows = rows.sort_by("offset")
        where = f"log {self._source.path}, partition {self._partition}"
        _check_dense(rows["offset"].to_numpy(), self._offset + 1, until, where)
        return rows


def _tombstone_keys(user_ids: pa.ChunkedArray) -> list[bytes | None]:
    return [None if user_id is None else user_id.encode() for user_id in user_ids.to_pylist()]


def _check_dense(offset_N: np.ndarray, first: int, last: int, where: str) -> None:
    wanted_N = np.arange(first, last + 1)
    if np.array_equal(offset_N, wanted_N):
        return
    missing_N = np.setdiff1d(wanted_N, offset_N)
    if len(missing_N) == 0:
        repeated_N = offset_N[1:][np.diff(offset_N) == 0]
        raise InputError(f"{where}: offset {repeated_N[0]} is there twice; was it ingested by two programs at once?")
    lost_N = missing_N[: np.flatnonzero(np.diff(missing_N) != 1)[:1].sum() + 1] if len(missing_N) > 1 else missing_N
    raise InputError(
        f"{where}: offsets from {lost_N[0]} on are missing ({len(missing_N)} of {first} to {last}); "
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
    wanted = pc.and_(pc.equal(files["partition.partition"], partition), pc.equal(files["max.epoch"], epoch))
    last = pc.max(files.filter(wanted)["max.offset"]).as_py()
    return -1 if last is None else last
