"""The releases as a Delta table: a small file that each step writes anew, so that of two steps at once one is refused.

A step is one commit. A kill leaves the table as it was before or as it is after, and what is live changes for all
rankers at once. Who is refused reads again, and judges its step by what is there now.
"""

from __future__ import annotations

import getpass
import os
import time
from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path

import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError
from msgspec.structs import asdict
from tenacity import RetryError, Retrying, retry_if_exception_type, stop_after_attempt, wait_random

from jobs.releases.states import Change, Entry, Releases, State
from models.errors import CheckpointError, StoreError
from models.files import FileVersion, file_version

SCHEMA = pa.schema(
    [
        pa.field("place", pa.int64(), nullable=False),
        pa.field("checkpoint_id", pa.string(), nullable=False),
        pa.field("path", pa.string(), nullable=False),
        pa.field("state", pa.string(), nullable=False),
        pa.field("at_ms", pa.int64(), nullable=False),
        pa.field("by", pa.string(), nullable=False),
        pa.field("note", pa.string(), nullable=False),
        pa.field("against", pa.string()),
    ]
)
TRIES, WAIT_S = 20, 0.2
_LOG = "_delta_log"

Step = Callable[[Releases], Sequence[Change]]


def read_releases(path: Path) -> Releases:
    """All of them; none where there is no table. Raises StoreError for one that cannot be read."""
    return _read(path, _opened(path))


def record(path: Path, step: Step, note: str = "", dry_run: bool = False) -> list[Entry]:
    """The entries that the step adds to what is there, written in one commit unless it is a dry run.

    Raises what `step` raises, and StoreError for a table that cannot be written.
    """
    turns = Retrying(
        retry=retry_if_exception_type(CommitFailedError), wait=wait_random(0, WAIT_S), stop=stop_after_attempt(TRIES)
    )
    try:
        return turns(_record_once, path, step, note, dry_run)
    except RetryError as error:
        last = error.last_attempt.exception()
        raise StoreError(
            f"the releases cannot be written to {path}: refused {TRIES} times, at last: {_said(last)}"
        ) from last
    except (DeltaError, OSError) as error:
        raise StoreError(f"the releases cannot be written to {path}: {_said(error)}") from error


def is_releases(path: Path) -> bool:
    """Whether the path is such a table, and not a checkpoint."""
    return (path / _LOG).is_dir()


def newest_release(path: Path, state: State) -> Entry | None:
    """The release that came into this state last, of those that are in it.

    For those who ask every second: the table is read only when it has a commit more than last time. Raises StoreError
    for a table that cannot be read.
    """
    try:
        # A commit's file is written once, whole, and the newest has the greatest name.
        newest = max((commit.name for commit in (path / _LOG).glob("[0-9]*.json")), default=None)
    except OSError as error:
        raise StoreError(f"the releases at {path} cannot be read: {_said(error)}") from error
    if newest is None:
        return None
    current = _as_of(path, newest, file_version(path / _LOG / newest)).current.values()
    return max((entry for entry in current if entry.state == state), key=lambda entry: entry.at_ms, default=None)


@lru_cache(maxsize=8)
def _as_of(path: Path, newest: str, version: FileVersion | None) -> Releases:
    return read_releases(path)


def checkpoint_paths(path: Path) -> list[Path]:
    """The checkpoints of a table of releases that are not retired; of a checkpoint, itself."""
    if not is_releases(path):
        return [path]
    return [Path(e.path) for e in read_releases(path).current.values() if e.state != State.RETIRED]


def release_in(path: Path, state: State) -> Entry:
    """`newest_release`. Raises CheckpointError for none, StoreError as that."""
    release = newest_release(path, state)
    if release is None:
        remedy = "; run vql release promote" if state is State.LIVE else ""
        raise CheckpointError(f"none of the releases {path} is {state}{remedy}")
    return release


def live_path(path: Path) -> Path:
    """The checkpoint that is live in a table of releases; of a checkpoint, itself. Raises as `release_in`."""
    return Path(release_in(path, State.LIVE).path) if is_releases(path) else path


def _record_once(path: Path, step: Step, note: str, dry_run: bool) -> list[Entry]:
    table = _opened(path)
    before = _read(path, table)
    now_ms, by = time.time_ns() // 1_000_000, _operator()
    added = [
        Entry(
            checkpoint_id=change.checkpoint_id,
            path=change.path,
            state=change.to,
            at_ms=now_ms,
            by=by,
            note=note,
            against=change.against,
        )
        for change in step(before)
    ]
    if added and not dry_run:
        _write(path, table, [*before.entries, *added])
    return added


def _said(error: BaseException | None) -> str:
    """Its first line: what follows in Delta's errors is a stack."""
    return next(iter(str(error).splitlines()), "")


def _operator() -> str:
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # In a container, whose user has no name.
        return f"uid {os.getuid()}"


def _opened(path: Path) -> DeltaTable | None:
    try:
        return DeltaTable(path)
    except TableNotFoundError:
        return None
    except (DeltaError, OSError) as error:
        raise StoreError(f"the releases at {path} cannot be read: {_said(error)}") from error


def _read(path: Path, table: DeltaTable | None) -> Releases:
    if table is None:
        return Releases()
    try:
        rows = table.to_pyarrow_table().sort_by("place").drop_columns("place").to_pylist()
        return Releases(tuple(Entry(**row | {"state": State(row["state"])}) for row in rows))
    except (DeltaError, OSError, KeyError, TypeError, ValueError) as error:
        raise StoreError(f"the releases at {path} cannot be read: {_said(error)}") from error


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
