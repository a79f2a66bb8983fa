"""Bad records are kept, not dropped: a Delta table with the reason, the position and the original bytes of each.

A letter is known by its position (epoch, partition, offset), which says everything about it: a record is bad or
good whatever the checkpoint. `write_dead_letters` merges on the position, so a replay, a second stream over the
same log, or two at once leave each letter once (Delta's conflict check makes the loser read again). Rejected: an
application transaction with the last offset as version; a stream that later starts at an earlier position would
take its letters for written and lose them.

Originals can be of many megabytes, and letters many: `summaries` does not hold the originals.
Knows nothing of Beam, so that the on-call's commands start at once; the stream's step is in keep_dead_letters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import structlog
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from deltalake.table import TableMerger

from models.errors import InputError, StoreError
from models.forgotten import ERASED, Forgotten

Position = tuple[int, int, int]
SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("value", pa.binary()),
        ("key", pa.binary()),
        ("log_time_ms", pa.int64()),
    ]
)
TRIES = 20
WRITES_PER_TIDY = 50
SAME_POSITION = "old.partition = new.partition AND old.epoch = new.epoch AND old.offset = new.offset"
_SUMMARY = {name: ds.field(name) for name in ("epoch", "partition", "offset", "reason", "detail", "log_time_ms")} | {
    "size_bytes": pc.coalesce(pc.binary_length(ds.field("value")), pa.scalar(0, pa.int32()))
}


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """A record that is no event: where it was, the reason code, a sentence for people, the original key and bytes.

    value None: a tombstone. log_time_ms: the record's own timestamp in the log, -1 where it is not known.
    """

    epoch: int
    partition: int
    offset: int
    reason: str
    detail: str
    value: bytes | None
    key: bytes | None = None
    log_time_ms: int = -1

    @property
    def position(self) -> Position:
        return (self.epoch, self.partition, self.offset)

    @property
    def size_bytes(self) -> int:
        return len(self.value or b"") + len(self.key or b"")

    def is_forgotten(self, forgotten: Forgotten) -> bool:
        """Whether it is of a user who was forgotten later than its record came."""
        return forgotten.covers(self.key, self.value, self.position)

    def erased(self) -> DeadLetter:
        """What is left of it when its user is forgotten."""
        return replace(self, detail=ERASED, key=None, value=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class Selection:
    """Which letters; what is empty or None does not restrict. since_offset: inclusive, in every partition."""

    reasons: tuple[str, ...] = ()
    partitions: tuple[int, ...] = ()
    since_offset: int | None = None
    positions: tuple[Position, ...] = ()

    def condition(self) -> ds.Expression | None:
        """The selection by numbers as a filter of Arrow, which knows the files that hold them; a superset.

        Rejected: the reasons too; Arrow cannot compare delta-rs's statistics of strings with its own strings.
        """
        parts = []
        if partitions := self.partitions or tuple({partition for _, partition, _ in self.positions}):
            parts.append(ds.field("partition").isin(partitions))
        if self.since_offset is not None:
            parts.append(ds.field("offset") >= self.since_offset)
        if self.positions:
            parts.append(ds.field("offset").isin([offset for _, _, offset in self.positions]))
        whole = None
        for part in parts:
            whole = part if whole is None else whole & part
        return whole

    def narrow(self, rows: pa.Table) -> pa.Table:
        """Those of the rows under `condition` that are selected."""
        if self.reasons:
            rows = rows.filter(pc.is_in(rows["reason"].cast(pa.string()), pa.array(self.reasons, pa.string())))
        if not self.positions:
            return rows
        wanted = set(self.positions)
        places = zip(*(rows[name].to_pylist() for name in ("epoch", "partition", "offset")), strict=True)
        return rows.filter(pa.array([place in wanted for place in places], pa.bool_()))


def write_dead_letters(path: Path, letters: Sequence[DeadLetter]) -> int:
    """Keep the letters that are not there yet; how many were new. Raises StoreError when it cannot."""
    if not letters:
        return 0
    unique = {letter.position: letter for letter in letters}
    rows = pa.Table.from_pylist([asdict(letter) for letter in unique.values()], SCHEMA)
    return merge(path, rows, lambda merger: merger.when_not_matched_insert_all())["num_target_rows_inserted"]


def merge(path: Path, rows: pa.Table, change: Callable[[TableMerger], TableMerger]) -> dict[str, int]:
    """Merge rows into the Delta table at path, made when absent, on their position; Delta's counts of what was done.

    In `change` the table is "old" and the rows are "new". Raises StoreError.
    """
    for _ in range(TRIES):
        try:
            table = _table(path, rows.schema)
            counts = change(table.merge(rows, SAME_POSITION, source_alias="new", target_alias="old")).execute()
        except CommitFailedError:
            continue
        except (DeltaError, OSError) as error:
            raise StoreError(f"dead letters cannot be written to {path}: {error}") from error
        _tidy(table)
        return counts
    raise StoreError(f"dead letters cannot be written to {path}: other writers came first {TRIES} times")


def _tidy(table: DeltaTable) -> None:
    """Now and then, make one file of many: each write adds one, and a merge looks at each."""
    if table.version() % WRITES_PER_TIDY:
        return
    try:
        table.optimize.compact()
        # Files that no version of the last week names; a reader of an old version has that long.
        table.vacuum(dry_run=False)
    except (DeltaError, OSError) as error:
        structlog.get_logger().warning("dead letters were kept, and not compacted", error=str(error))


def read_dead_letters(path: Path, selection: Selection = Selection()) -> list[DeadLetter]:
    """The letters by position, originals and all; none when nothing bad was ever met. Raises InputError."""
    rows = read_rows(path, selection, SCHEMA.names)
    if rows is None:
        return []
    return sorted((DeadLetter(**row) for row in rows.to_pylist()), key=lambda letter: letter.position)


def summaries(path: Path, selection: Selection) -> pa.Table:
    """The letters without their originals, but with their size_bytes, in no order. Raises InputError."""
    rows = read_rows(path, selection, _SUMMARY)
    if rows is None:
        fields = [(name, pa.int32() if name == "size_bytes" else SCHEMA.field(name).type) for name in _SUMMARY]
        return pa.schema(fields).empty_table()
    return rows


def read_rows(path: Path, selection: Selection, columns: Sequence[str] | dict[str, ds.Expression]) -> pa.Table | None:
    """The selected rows of a Delta table that is known by positions; None when there is no table."""
    try:
        files = DeltaTable(path).to_pyarrow_dataset()
        # Few rows at a time: one can be of ten megabytes.
        scanner = files.scanner(columns, selection.condition(), batch_size=1_000, batch_readahead=1)
        return selection.narrow(scanner.to_table())
    except TableNotFoundError:
        return None
    except (DeltaError, pa.ArrowException, OSError) as error:
        raise InputError(f"the dead letters at {path} cannot be read: {error}; restore the table's files") from error


def words(position: Iterable[int]) -> str:
    """A position as people write it.

    >>> words((1, 0, 17))
    '1:0:17'
    """
    return ":".join(map(str, position))


def _table(path: Path, schema: pa.Schema) -> DeltaTable:
    try:
        return DeltaTable(path)
    except TableNotFoundError:
        return DeltaTable.create(path, schema, mode="ignore", partition_by=["partition"])
