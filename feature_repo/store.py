"""What a fenced online store promises, whatever it is built on; every store passes the same conformance tests.

A store holds, for each checkpoint apart: the users' rows, the positions that the stream has committed, and the
record of the backfill. They live and die together: a store that is lost cannot be taken for a complete one.

The fence: `put_rows` writes a row only if its stamp (epoch, offset, revision) is greater than the stored one,
atomically. A put without `folded` keeps the stored `folded`, and is refused unless that one still has the stamp
the writer read. A refused put means "read again and redo". So a slow or doubled writer can never undo a newer row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec

from models.row import Row, RowBytes
from models.wire import Stamp, encode_recent


@dataclass(frozen=True, kw_only=True, slots=True)
class RowPut:
    """A row to write. `folded` None: unchanged since it was read with folded_stamp."""

    user_id: str
    stamp: Stamp
    recent: bytes
    folded_stamp: Stamp
    folded: bytes | None


class Backfill(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a finished backfill: rows of every user up to this cut are in the store.

    log_id names the log itself, whatever its path; a backfill again raises the revision that its rows are stamped with.
    newer: rows that the store held newer already, and kept.
    """

    epoch: int
    cut: dict[int, int]
    users: int
    events: int
    log: str
    log_id: str = ""
    revision: int = 0
    newer: int = 0


class RowStore(Protocol):
    """Rows by (checkpoint, user), fenced by their stamps. Raises StoreError when the store cannot be used."""

    def get_rows(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[RowBytes | None]:
        """The rows in the order of user_ids, in one read; None for absent and expired users."""
        ...

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        """Put if newer, each row atomically; False where the fence refused."""
        ...

    def count_rows(self, checkpoint_id: str) -> int: ...

    def delete_user(self, user_id: str) -> int:
        """Erase the user's rows of every checkpoint; how many there were."""
        ...

    def positions(self, checkpoint_id: str) -> dict[int, tuple[int, int]]:
        """Committed (epoch, offset) by partition: every event at or below it is in the rows."""
        ...

    def commit_positions(self, checkpoint_id: str, epoch: int, offsets: Mapping[int, int]) -> None:
        """Raise the committed offsets; a lower (epoch, offset) than the stored one is ignored."""
        ...

    def backfill(self, checkpoint_id: str) -> Backfill | None: ...

    def record_backfill(self, checkpoint_id: str, backfill: Backfill) -> None: ...


def row_put(user_id: str, row: Row, stored: Row | None) -> RowPut:
    """The put that brings the store from `stored` (None: no row) to `row`, its folded part only if it changed."""
    unchanged = stored is not None and row.folded_data is stored.folded_data
    return RowPut(
        user_id=user_id,
        stamp=row.stamp,
        recent=encode_recent(row.spec.checkpoint_id, row.stamp, row.recent),
        folded_stamp=row.folded_stamp,
        folded=None if unchanged else row.folded_data,
    )
