"""The releases as a Delta table: a small file that each step writes anew, so that of two steps at once one is refused.

A step is one commit. A kill leaves the table as it was before or as it is after, and what is live changes for all
rankers at once. Who is refused reads again, and judges its step by what is there now.
"""

from __future__ import annotations

import getpass
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from msgspec.structs import asdict
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from jobs.releases.states import Change, Entry, Releases, State
from models.errors import StoreError

SCHEMA = pa.schema(
    [
        pa.field("place", pa.int64(), nullable=False),
        pa.field("checkpoint_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("at_ms", pa.int64(), nullable=False),
        pa.field("by", pa.string(), nullable=False),
        pa.field("note", pa.string(), nullable=False),
    ]
)
TRIES, WAIT_S = 20, 0.2


def read_releases(path: Path) -> Releases:
    """All of them; none where there is no table. Raises StoreError for one that cannot be read."""
    return _read(_opened(path))


def record(
    path: Path, step: Callable[[Releases], Sequence[Change]], note: str = "", dry_run: bool = False
) -> list[Entry]:
    """The entries that the step adds to what is there, written in one commit unless it is a dry run.

    Raises what `step` raises, and StoreError for a table that cannot be written.
    """
    turns = Retrying(
        retry=retry_if_exception_type(CommitFailedError), wait=wait_random(0, WAIT_S), stop=stop_after_attempt(TRIES)
    )
    try:
        return turns(_record_once, path, step, note, dry_run)
    except RetryError as error:
        raise StoreError(f"the releases cannot be written to {path}: others came first {TRIES} times") from error
    except (DeltaError, OSError) as error:
        raise StoreError(f"the releases cannot be written to {path}: {error}") from error


def _record_once(path: Path, step: Callable[[Releases], Sequence[Change]], note: str, dry_run: bool) -> list[Entry]:
    table = _opened(path)
    before = _read(table)
    now_ms, by = time.time_ns() // 1_000_000, getpass.getuser()
    added = [
        Entry(checkpoint_id=entry.checkpoint_id, path=entry.path, state=state, at_ms=now_ms, by=by, note=note)
        for entry, state in step(before)
    ]
    if added and not dry_run:
        _write(path, table, [*before.entries, *added])
    return added


def _opened(path: Path) -> DeltaTable | None:
    try:
        return DeltaTable(path)
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        raise StoreError(f"the releases at {path} cannot be read: {error}") from error


def _read(table: DeltaTable | None) -> Releases:
    if table is None:
        return Releases()
    rows = table.to_pyarrow_table().sort_by("place").drop_columns("place").to_pylist()
    return Releases(tuple(Entry(**row | {"state": State(row["state"])}) for row in rows))


def _write(path: Path, table: DeltaTable | None, entries: Sequence[Entry]) -> None:
    """Raises CommitFailedError where the table is another one by now."""
    rows = [asdict(entry) | {"place": place, "state": str(entry.state)} for place, entry in enumerate(entries)]
    data = pa.Table.from_pylist(rows, SCHEMA)
    if table is not None:
        write_deltalake(table, data, mode="overwrite")
        return
    try:
        write_deltalake(path, data, mode="error")
    except DeltaError as error:
        if _opened(path) is None:
            raise
        raise CommitFailedError(str(error)) from error
