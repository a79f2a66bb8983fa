"""The Delta tables that hold users, how one user is erased from each, and how what was erased leaves the disk.

USER_TABLES is the list: whoever adds a table with users to a log adds a line. By delta-rs; no JVM.

A deleted row is in old files until they are vacuumed, and its user in the log of the table as well: minima and maxima
of user_id and event_id in the commits and in Spark's checksums (.crc), the predicate of the very deletion. So a purge
ends with a checkpoint behind which all older commits are removed, and with them the versions that could be read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from deltalake import CommitProperties, DeltaTable, Transaction, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError

from models.errors import InputError, StoreError
from models.forgotten import ERASED, Request, mentions, stands_in
from models.user_hash import hashed_user, key_id

TRIES = 20
PLACES_PER_UPDATE = 500
POSITION = ("epoch", "partition", "offset")
INGEST_APP = "vql-ingest"
Change = Callable[[DeltaTable], int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Target:
    """Who is to be erased, up to where; key: of the keyed hash."""

    user_id: str
    requests: Sequence[Request]
    key: bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class UserTable:
    """A table that holds users. erase: makes the user go, and says how many rows that were."""

    name: str
    erase: Callable[[Path, Target], int]


def erase_events(path: Path, target: Target) -> int:
    """Delete the user's events; tombstones at the requests' own places stay, as the places of all readers' positions.

    A log of files is not dense any more afterwards.
    """
    _change(path, _not_dense)
    below = " OR ".join(f"({_below(request)})" for request in target.requests)
    return _delete(path, f"user_id = {_quoted(target.user_id)} AND ({below}) AND NOT ({_at(target)})")


def blank_tombstones(path: Path, target: Target) -> int:
    """Take the user out of the tombstones: a place stays, which readers pass over."""
    where = f"user_id = {_quoted(target.user_id)} AND value IS NULL AND ({_at(target)})"
    return _update(path, {"user_id": "NULL"}, where)


def erase_letters(path: Path, target: Target) -> int:
    """Blank the bytes of the user's records that were no events. Their places and reasons stay, so that counts do."""
    columns = DeltaTable(path).schema().to_arrow().names
    if "digest" in columns:
        return _blank_source_rows(path, target.user_id)
    rows = _rows(path, [*POSITION, "key", "value", "detail"])
    # A record after the request is of the user's new beginning.
    places = [
        tuple(row[name] for name in POSITION)
        for row in rows
        if _is_of(target.user_id, row) and any(r.covers(*(row[name] for name in POSITION)) for r in target.requests)
    ]
    blank = {"key": "NULL", "value": "NULL", "detail": _quoted(ERASED)}
    return sum(_update(path, blank, _all_at(part)) for part in _parts(places))


def _blank_source_rows(path: Path, user_id: str) -> int:
    """Of a file's bad rows. The digest that tells them apart is a hash without a key, and goes as well."""
    rows = _rows(path, ["digest", "source", "detail"])
    found = [
        row["digest"]
        for row in rows
        if row["digest"] is not None and (_stands(user_id, row["source"]) or _stands(user_id, row["detail"]))
    ]
    blank = {"digest": "NULL", "source": "NULL", "detail": _quoted(ERASED)}
    return sum(
        _update(path, blank, f"digest IN ({', '.join(_quoted(digest) for digest in part)})") for part in _parts(found)
    )


def erase_reads(path: Path, target: Target) -> int:
    """Delete what rankers logged of the user, later reads as well: a read log is a sample."""
    return _delete(path, f"user_hash = X'{hashed_user(target.user_id, target.key).hex()}'")


def nobodys_reads(read_log: Path, key: bytes) -> int:
    """Logged reads whose users another key hashed, and nobody can tell."""
    return sum(
        pc.sum(pc.not_equal(batch["key_id"], key_id(key))).as_py() or 0 for batch in _batches(read_log, ["key_id"])
    )


USER_TABLES = (
    UserTable(name="events", erase=erase_events),
    UserTable(name="quarantine", erase=erase_letters),
    UserTable(name="dead_letters", erase=erase_letters),
)
READ_LOG = UserTable(name="logged reads", erase=erase_reads)
# These hold positions and counts, and no users; they are purged for what their commits may quote.
OTHER_TABLES = ("dead_letters_replayed",)


def present(log: Path, read_log: Path | None) -> list[tuple[Path, UserTable]]:
    """The tables with users that there are, and where."""
    named = [(log / table.name, table) for table in USER_TABLES]
    if read_log is not None:
        named.append((read_log, READ_LOG))
    return [(path, table) for path, table in named if DeltaTable.is_deltatable(str(path))]


def partitions_of(events: Path, user_id: str, epoch: int) -> list[int]:
    """The partitions that hold records of a user in this epoch."""
    found: set[int] = set()
    for batch in _batches(events, ["user_id", "epoch", "partition"]):
        mine = pc.and_(pc.equal(batch["user_id"].cast(pa.string()), user_id), pc.equal(batch["epoch"], epoch))
        found.update(batch["partition"].filter(mine).to_pylist())
    return sorted(found)


def append_tombstone(events: Path, user_id: str, epoch: int, partition: int) -> int:
    """Append it to a log of files; its offset. Takes its turn with ingests as they do, so that offsets are unique."""
    placed = -1

    def append(table: DeltaTable) -> int:
        nonlocal placed
        ends = [
            pc.max(batch["offset"].filter(pc.equal(batch["partition"], partition))).as_py()
            for batch in _batches_of(table, ["partition", "offset"])
        ]
        placed = max((end for end in ends if end is not None), default=-1) + 1
        row = {"epoch": epoch, "partition": partition, "offset": placed, "user_id": user_id}
        turn = (table.transaction_version(INGEST_APP) or 0) + 1
        properties = CommitProperties(app_transactions=[Transaction(INGEST_APP, turn)])
        rows = pa.Table.from_pylist([row], pa.schema(table.schema().to_arrow()))
        write_deltalake(table, rows, mode="append", commit_properties=properties)
        return 1

    _change(events, append)
    return placed


def purge(path: Path, retain_s: float) -> int:
    """Remove files and commits that no version of the last retain_s needs; how many old files that were.

    Raises StoreError when the table cannot be written.
    """
    removed = _change(path, lambda table: _vacuum(table, retain_s))

    def begin_anew(table: DeltaTable) -> int:
        # The newest commit is the only one that a checkpoint leaves, so it must be one that says nothing.
        write_deltalake(table, pa.schema(table.schema().to_arrow()).empty_table(), mode="append")
        table.create_checkpoint()
        return table.version()

    _remove_commits(path / "_delta_log", _change(path, begin_anew), time.time() - retain_s)
    return removed


def _vacuum(table: DeltaTable, retain_s: float) -> int:
    hours = int(-(-retain_s // 3600))
    # full: files too that a writer left which was killed.
    return len(table.vacuum(retention_hours=hours, enforce_retention_duration=False, dry_run=False, full=True))


def _remove_commits(folder: Path, version: int, before_s: float) -> None:
    """What is of older versions than the checkpoint, by name: commits, older checkpoints, Spark's checksums."""
    for path in sorted(folder.iterdir()):
        of = path.name.lstrip(".").partition(".")[0]
        if of.isdecimal() and int(of) < version and path.stat().st_mtime <= before_s:
            path.unlink(missing_ok=True)


def _not_dense(table: DeltaTable) -> int:
    if table.metadata().configuration.get("vql.dense", "true") == "true":
        table.alter.set_table_properties({"vql.dense": "false"}, raise_if_not_exists=False)
    return 0


def _delete(path: Path, where: str) -> int:
    return _change(path, lambda table: table.delete(where)["num_deleted_rows"])


def _update(path: Path, blank: dict[str, str], where: str) -> int:
    return _change(path, lambda table: table.update(predicate=where, updates=blank)["num_updated_rows"])


def _change(path: Path, change: Change) -> int:
    """Change the table as it is now, again if another writer came first."""
    for _ in range(TRIES):
        try:
            return change(DeltaTable(path)) or 0
        except CommitFailedError:
            continue
        except (DeltaError, OSError) as error:
            raise StoreError(f"{path} cannot be changed: {error}") from error
    raise StoreError(f"{path} cannot be changed: other writers came first {TRIES} times; run this again")


def _rows(path: Path, columns: list[str]) -> Iterator[dict]:
    for batch in _batches(path, columns):
        yield from batch.to_pylist()


def _batches(path: Path, columns: list[str]) -> Iterator[pa.RecordBatch]:
    try:
        yield from _batches_of(DeltaTable(path), columns)
    except (DeltaError, pa.ArrowException, OSError) as error:
        raise InputError(f"{path} cannot be read: {error}; restore the table's files") from error


def _batches_of(table: DeltaTable, columns: list[str]) -> Iterator[pa.RecordBatch]:
    # Few at a time: a letter can be of ten megabytes.
    return table.to_pyarrow_dataset().to_batches(columns=columns, batch_size=10_000, batch_readahead=1)


def _is_of(user_id: str, row: dict) -> bool:
    return mentions(user_id, row["key"], row["value"]) or _stands(user_id, row["detail"])


def _stands(user_id: str, text: str | None) -> bool:
    return text is not None and stands_in(user_id, text.encode())


def _below(request: Request) -> str:
    here = f'epoch = {request.epoch} AND partition = {request.partition} AND "offset" <= {request.offset}'
    return f"epoch < {request.epoch} OR ({here})"


def _at(target: Target) -> str:
    """Where the requests' own tombstones are."""
    return _all_at([(request.epoch, request.partition, request.offset) for request in target.requests])


def _all_at(places: Sequence[tuple[int, int, int]]) -> str:
    return " OR ".join(f'(epoch = {e} AND partition = {p} AND "offset" = {o})' for e, p, o in places)


def _parts(found: Sequence) -> Iterator[Sequence]:
    for start in range(0, len(found), PLACES_PER_UPDATE):
        yield found[start : start + PLACES_PER_UPDATE]


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
