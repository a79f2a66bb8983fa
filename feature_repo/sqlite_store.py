"""`SqliteRows`: the embedded online store, one SQLite file for all checkpoints of one machine. Knows no Feast.

Threads and processes of one machine may use the file at once (WAL mode: readers never wait, writers queue).

What a crash leaves. Each call is one transaction, so rows, positions and the backfill record are whole, and since
they share one log file they survive in the order in which they were written: no position without its rows. A killed
process loses nothing. After a power cut, `put_rows` may have lost its last transactions (synchronous=NORMAL), but
`commit_positions`, `record_backfill` and the deletions force the log to disk (FULL), and with it every row before.
So a stream that starts at `positions()` finds the rows at or below them.

An expired row (ttl_s after its last write) is absent for everyone, the fence included: its writer starts anew.
"""

from __future__ import annotations

import errno
import os
import sqlite3
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import msgspec

from feature_repo.sqlite_statements import (
    COMMIT_POSITION,
    DELETE_ROW,
    IS_FOLLOWED,
    PUT_FIRST,
    PUT_NEXT,
    SCHEMA,
    SCHEMA_VERSION,
)
from feature_repo.store import Backfill, Progress, RowPut, TakeRows
from models.errors import InputError, StoreError, UnavailableError
from models.files import disk_error
from models.row import RowBytes
from models.wire import Stamp

BUSY_TIMEOUT_S = 30.0
USERS_PER_SELECT = 500  # SQLite builds before 3.32 take 999 variables

_REMEDIES = {
    sqlite3.SQLITE_BUSY: f"another process held it for {BUSY_TIMEOUT_S:g} s; end that process and try again",
    sqlite3.SQLITE_CORRUPT: "it is damaged: move it away and run the backfill again",
    sqlite3.SQLITE_NOTADB: "it is no online store: name another path, or move it away and run the backfill again",
    sqlite3.SQLITE_CANTOPEN: "check that its folder exists and may be written",
    sqlite3.SQLITE_READONLY: "check that the file and its folder may be written",
    sqlite3.SQLITE_IOERR: "the disk failed: look at the system's log, then try again",
}

# SQLite's connections must be neither used nor closed in a forked child; kept here they are never collected.
_ABANDONED: list[list[sqlite3.Connection]] = []


class SqliteRows:
    """`feature_repo.store.RowStore` on one SQLite file. Picklable: the copy opens the file anew.

    Raises UnavailableError where another process holds the file, StoreError (path and remedy) where SQLite fails,
    where the file was made by another version or has gone since it was opened; MachineError for a full disk;
    InputError for a user id that is not Unicode text.
    """

    def __init__(self, path: Path, ttl_s: float | None = None, clock: Callable[[], float] = time.time) -> None:
        if ttl_s is not None and not ttl_s > 0:
            raise InputError(f"ttl_s is {ttl_s}; it must be over 0, or absent for rows that never expire")
        self.path = Path(path).absolute()
        self.ttl_s = ttl_s
        self._clock = clock
        self._idle: list[sqlite3.Connection] = []
        self._identity: tuple[int, int] | None = None
        self._pid = os.getpid()

    def __reduce__(self):
        return SqliteRows, (self.path, self.ttl_s, self._clock)

    def get_rows(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[RowBytes | None]:
        found = self._select("folded, recent", checkpoint_id, user_ids)
        rows = {user_id: RowBytes(folded=folded, recent=recent) for user_id, folded, recent in found}
        return [rows.get(user_id) for user_id in user_ids]

    def get_stamps(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[Stamp | None]:
        found = self._select('epoch, partition, "offset", revision', checkpoint_id, user_ids)
        stamps = {user_id: Stamp(epoch=e, partition=p, offset=o, revision=r) for user_id, e, p, o, r in found}
        return [stamps.get(user_id) for user_id in user_ids]

    def _select(self, columns: str, checkpoint_id: str, user_ids: Sequence[str]) -> list[tuple[Any, ...]]:
        """(user id, these columns) of the users who have a row."""
        found: list[tuple[Any, ...]] = []
        expired_ms = self._expired_ms(self._now_ms())
        with self._transaction("BEGIN") as connection:
            for start in range(0, len(user_ids), USERS_PER_SELECT):
                chunk = user_ids[start : start + USERS_PER_SELECT]
                found += connection.execute(
                    f"SELECT user_id, {columns} FROM rows WHERE checkpoint_id = ? AND written_ms > ? "
                    f"AND user_id IN ({','.join('?' * len(chunk))})",
                    (checkpoint_id, expired_ms, *chunk),
                )
        return found

    def reading(
        self, checkpoint_id: str, user_ids: Sequence[str], take: TakeRows, until_s: float | None = None
    ) -> Generator[None, None, None]:
        # Nothing bounds how long a disk takes.
        yield
        take(0, self.get_rows(checkpoint_id, user_ids))

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        now_ms = self._now_ms()
        times = {"now_ms": now_ms, "expired_ms": self._expired_ms(now_ms), "checkpoint_id": checkpoint_id}
        with self._transaction("BEGIN IMMEDIATE") as connection:
            return [connection.execute(_statement(put), times | _values(put)).rowcount > 0 for put in puts]

    def count_rows(self, checkpoint_id: str) -> int:
        with self._transaction("BEGIN") as connection:
            query = "SELECT count(*) FROM rows WHERE checkpoint_id = ? AND written_ms > ?"
            return int(connection.execute(query, (checkpoint_id, self._expired_ms(self._now_ms()))).fetchone()[0])

    def delete_user(self, user_id: str) -> int:
        with self._durable_transaction() as connection:
            return connection.execute("DELETE FROM rows WHERE user_id = ?", (user_id,)).rowcount

    def delete_row(self, checkpoint_id: str, user_id: str, stamp: Stamp) -> bool:
        with self._durable_transaction() as connection:
            place = (user_id, checkpoint_id, stamp.epoch, stamp.offset, stamp.revision, stamp.partition)
            done = connection.execute(DELETE_ROW, place).rowcount > 0
        self._empty_the_log()
        return done

    def delete_checkpoint(self, checkpoint_id: str) -> int:
        with self._durable_transaction() as connection:
            connection.execute("DELETE FROM backfills WHERE checkpoint_id = ?", (checkpoint_id,))
            connection.execute("DELETE FROM positions WHERE checkpoint_id = ?", (checkpoint_id,))
            connection.execute("DELETE FROM logs WHERE checkpoint_id = ?", (checkpoint_id,))
            return connection.execute("DELETE FROM rows WHERE checkpoint_id = ?", (checkpoint_id,)).rowcount

    def positions(self, checkpoint_id: str) -> dict[int, tuple[int, int]]:
        query = 'SELECT partition, epoch, "offset" FROM positions WHERE checkpoint_id = ?'
        with self._transaction("BEGIN") as connection:
            return {p: (epoch, offset) for p, epoch, offset in connection.execute(query, (checkpoint_id,))}

    def commit_positions(self, checkpoint_id: str, epoch: int, offsets: Mapping[int, int]) -> None:
        with self._durable_transaction() as connection:
            values = [(checkpoint_id, partition, epoch, offset) for partition, offset in offsets.items()]
            connection.executemany(COMMIT_POSITION, values)

    def bind_log(self, checkpoint_id: str, epoch: int, log: str) -> str:
        query, place = "SELECT log FROM logs WHERE checkpoint_id = ? AND epoch = ?", (checkpoint_id, epoch)
        with self._transaction("BEGIN") as connection:
            row = connection.execute(query, place).fetchone()
        if row is None:
            with self._durable_transaction() as connection:
                connection.execute("INSERT OR IGNORE INTO logs VALUES (?, ?, ?)", (*place, log))
                row = connection.execute(query, place).fetchone()
        return row[0]

    def backfill(self, checkpoint_id: str) -> Backfill | None:
        query = "SELECT record FROM backfills WHERE checkpoint_id = ?"
        with self._transaction("BEGIN") as connection:
            row = connection.execute(query, (checkpoint_id,)).fetchone()
        return None if row is None else msgspec.json.decode(row[0], type=Backfill)

    def record_backfill(self, checkpoint_id: str, backfill: Backfill) -> None:
        record = msgspec.json.encode(backfill).decode()
        with self._durable_transaction() as connection:
            connection.execute("INSERT OR REPLACE INTO backfills VALUES (?, ?)", (checkpoint_id, record))

    def progress(self, checkpoint_id: str) -> Progress:
        return Progress(positions=self.positions(checkpoint_id), backfill=self.backfill(checkpoint_id))

    def checkpoint_ids(self) -> list[str]:
        query = " UNION ".join(f"SELECT checkpoint_id FROM {table}" for table in ("rows", "positions", "backfills"))
        with self._transaction("BEGIN") as connection:
            return sorted(checkpoint_id for (checkpoint_id,) in connection.execute(query))

    def damage(self) -> str | None:
        """What SQLite finds wrong with the file's structure; None: nothing. Reads all of it."""
        with self._transaction("BEGIN") as connection:
            (found,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        return None if found == "ok" else found

    def close(self) -> None:
        while self._idle:
            self._idle.pop().close()
        self._identity = None

    def remove(self) -> None:
        self.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.path}{suffix}").unlink(missing_ok=True)

    def _empty_the_log(self) -> None:
        """Pages as they were before a deletion stay in the write-ahead log until it is written over."""
        connection = self._take()
        try:
            # Where somebody reads an old state, its end is left for the next time.
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            connection.close()
            raise _explained(error, self.path) from error
        self._idle.append(connection)

    def _now_ms(self) -> int:
        return int(self._clock() * 1000)

    def _expired_ms(self, now_ms: int) -> int:
        """Rows written at or before this time are expired."""
        return -1 if self.ttl_s is None else now_ms - int(self.ttl_s * 1000)

    def _durable_transaction(self) -> AbstractContextManager[sqlite3.Connection]:
        """A write that, once returned, survives a power cut together with all writes before it."""
        return self._transaction("BEGIN IMMEDIATE", "FULL")

    @contextmanager
    def _transaction(self, begin: str, synchronous: str = "NORMAL") -> Iterator[sqlite3.Connection]:
        """One transaction on a connection of its own; a failed one is rolled back by closing the connection."""
        connection = None
        try:
            connection = self._take()
            connection.execute(f"PRAGMA synchronous = {synchronous}")
            connection.execute(begin)
            yield connection
            connection.execute("COMMIT")
        except BaseException as error:
            if connection is not None:
                connection.close()
            explained = _explained(error, self.path)
            if explained is error:
                raise
            raise explained from error
        self._idle.append(connection)

    def _take(self) -> sqlite3.Connection:
        """An idle connection of this process, or a new one."""
        if self._pid != os.getpid():
            _ABANDONED.append(self._idle)
            self._idle, self._identity, self._pid = [], None, os.getpid()
        if self._identity is None:
            connection = _open(self.path)
            self._identity = _identity(self.path)
            return connection
        # Without this, a writer would go on for days in a file that nobody else can see any more.
        if _identity(self.path) != self._identity:
            raise StoreError(f"online store {self.path} was removed or replaced while in use; restart this program")
        try:
            return self._idle.pop()
        except IndexError:
            return _open(self.path)


def _statement(put: RowPut) -> str:
    if put.follows is None:
        return PUT_FIRST
    return PUT_NEXT if put.folded is None or put.follows.offset >= 0 else PUT_FIRST + IS_FOLLOWED


def _values(put: RowPut) -> dict[str, str | int | bytes | None]:
    follows = put.follows or put.stamp  # not looked at in a put that follows none
    return {
        "user_id": put.user_id,
        "epoch": put.stamp.epoch,
        "offset": put.stamp.offset,
        "revision": put.stamp.revision,
        "partition": put.stamp.partition,
        "folded": put.folded,
        "recent": put.recent,
        "follows_epoch": follows.epoch,
        "follows_offset": follows.offset,
        "follows_revision": follows.revision,
        "follows_partition": follows.partition,
    }


def _open(path: Path) -> sqlite3.Connection:
    connection = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    try:
        _enter_wal(connection, path)
        # Deleted rows are overwritten with zeros: an erased user's history does not stay in free pages.
        connection.execute("PRAGMA secure_delete = ON")
        if _schema_version(connection) == 0:
            _create(connection)
        version = _schema_version(connection)
        if version != SCHEMA_VERSION:
            raise StoreError(
                f"online store {path} has schema {version}, this program knows {SCHEMA_VERSION}; "
                "use the program that made it, or move it away and run the backfill again"
            )
    except BaseException:
        connection.close()
        raise
    return connection


def _enter_wal(connection: sqlite3.Connection, path: Path) -> None:
    """SQLite does not wait for its lock when two processes switch a new file at once, so this does."""
    deadline_s = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            (mode,) = connection.execute("PRAGMA journal_mode = WAL").fetchone()
            break
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline_s:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise StoreError(f"online store {path} cannot use a write-ahead log; put it on a local disk")


def _create(connection: sqlite3.Connection) -> None:
    connection.execute("BEGIN IMMEDIATE")
    if _schema_version(connection) == 0:
        for statement in SCHEMA.split(";"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")
    connection.execute("COMMIT")


def _schema_version(connection: sqlite3.Connection) -> int:
    return connection.execute("PRAGMA user_version").fetchone()[0]


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return (status.st_dev, status.st_ino)


def _explained(error: BaseException, path: Path) -> BaseException:
    """What a caller should see instead of SQLite's error; any other error as it is."""
    if isinstance(error, UnicodeEncodeError):
        return InputError(f"user id {error.object!r} is not Unicode text ({error.reason}); no event can carry it")
    if not isinstance(error, sqlite3.Error):
        return error
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
    if code == sqlite3.SQLITE_FULL:
        return disk_error(OSError(errno.ENOSPC, str(error)), path)
    remedy = _REMEDIES.get(code, "this is a fault of the program: report it")
    kind = UnavailableError if code == sqlite3.SQLITE_BUSY else StoreError
    return kind(f"online store {path}: {error}; {remedy}")
