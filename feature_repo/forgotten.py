"""The log's table `forgotten`: who was forgotten up to where, for whoever writes or reads a log, and what was done.

A row of the kind "request" suppresses; one of the kind "done" is the audit record of a run, with its counts. Neither
has an id. All rows are of one key, and say which: with another one nobody would be found, and everybody brought back.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError

from models.errors import InputError, VqlError
from models.forgotten import NOBODY_FORGOTTEN, Forgotten, Request
from models.user_hash import KEY_FILE, hashed_user, key_id, user_hash_key

FORGOTTEN = "forgotten"
REQUEST, DONE = "request", "done"
LOOK_EVERY_S = 5.0
_log = logging.getLogger(__name__)
SCHEMA = pa.schema(
    [
        ("kind", pa.string()),
        ("user_hash", pa.binary()),
        ("key_id", pa.string()),
        ("epoch", pa.int32()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("requested_ms", pa.int64()),
        ("written_ms", pa.int64()),
        ("counts", pa.string()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ForgottenRef:
    """Where the table is, and the key: what travels to workers."""

    path: Path
    key_file: Path | None


def read_forgotten(ref: ForgottenRef) -> Forgotten:
    """Everybody forgotten so far. Raises InputError for a table that cannot be read, and for no key or another one."""
    try:
        rows = DeltaTable(ref.path).to_pyarrow_table().to_pylist()
    except TableNotFoundError:
        return Forgotten(key_file=ref.key_file)
    except (DeltaError, OSError) as error:
        raise InputError(f"the list of forgotten users {ref.path} cannot be read: {error}; restore it") from error
    mine = key_id(user_hash_key(ref.key_file))
    if any(row["key_id"] != mine for row in rows):
        raise InputError(f"{KEY_FILE}: {ref.key_file} is another key than the one that {ref.path} was made with")
    requests: dict[bytes, tuple[Request, ...]] = {}
    for row in sorted(rows, key=lambda row: row["written_ms"]):
        if row["kind"] == REQUEST:
            request = Request(*(row[name] for name in Request._fields))
            requests[row["user_hash"]] = (*requests.get(row["user_hash"], ()), request)
    return Forgotten(key_file=ref.key_file, requests=requests)


def write_requests(ref: ForgottenRef, user_id: str, requests: Sequence[Request], now_ms: int) -> None:
    """Suppress the user up to these positions. The first request of all makes the table."""
    _append(ref.path, [_row(ref, REQUEST, user_id, request, now_ms) for request in requests])


def write_done(ref: ForgottenRef, user_id: str, request: Request, counts: Mapping[str, int], now_ms: int) -> None:
    """The audit record of a run: when, and how much of what was erased."""
    told = msgspec.json.encode(dict(counts)).decode()
    _append(ref.path, [_row(ref, DONE, user_id, request, now_ms) | {"counts": told}])


def _row(ref: ForgottenRef, kind: str, user_id: str, request: Request, now_ms: int) -> dict[str, object]:
    key = user_hash_key(ref.key_file)
    who = {"user_hash": hashed_user(user_id, key), "key_id": key_id(key)}
    return {"kind": kind, "written_ms": now_ms, "counts": None} | who | request._asdict()


def _append(path: Path, rows: list[dict[str, object]]) -> None:
    write_deltalake(path, pa.Table.from_pylist(rows, SCHEMA), mode="append")


class WatchedForgotten:
    """The list as of a few seconds ago, for who runs on and on. One that cannot be read is logged, the old one kept.

    A stream goes on without a new list, because rows and tombstones erase as well; it begins with none that it cannot
    read.
    """

    def __init__(self, ref: ForgottenRef, clock: Callable[[], float] = time.monotonic) -> None:
        self._ref = ref
        self._clock = clock
        self._known = read_forgotten(ref) if ref.path.exists() else NOBODY_FORGOTTEN
        self._look_at_s = clock() + LOOK_EVERY_S

    @property
    def known(self) -> Forgotten:
        """The list, after a look if one is due."""
        if self._clock() >= self._look_at_s:
            self._look_at_s = self._clock() + LOOK_EVERY_S
            if self._ref.path.exists():
                self._look()
        return self._known

    def _look(self) -> None:
        try:
            self._known = read_forgotten(self._ref)
        except VqlError as error:
            _log.error("the list of forgotten users is not looked at: %s", error)
