"""What a fenced online store promises, whatever it is built on; every store passes the same conformance tests.

A store holds, for each checkpoint apart: the users' rows, the positions that the stream has committed, and the
record of the backfill. They live and die together: a store that is lost cannot be taken for a complete one.

The fence is compare-and-set, atomic for each row: `put_rows` writes a row only if its stamp (epoch, offset,
revision) is greater than the stored one, and if the stored row is the very one that the writer went on from. A
refused put means "read again and redo". So a slow or doubled writer, or one that kept a row in memory, can undo
neither a newer row nor a backfill, a repair or an erasure. A put that goes on from nothing (a backfill, which folds
a user's events from the first) only needs the greater stamp.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Protocol, TypeVar

import msgspec

from models.errors import StoreError
from models.row import Row, RowBytes
from models.wire import Stamp, encode_recents

TakeRows = Callable[[int, Sequence[RowBytes | None]], None]
Result = TypeVar("Result")


class RowPut(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row to write. `folded` None: unchanged since it was read, which only a put that follows a row can say.

    follows: the stamp of the row that this one continues, by every field. Offset -1: there was no row. None: it
    continues none, and any older row may be replaced.
    """

    user_id: str
    stamp: Stamp
    recent: bytes
    folded: bytes | None
    follows: Stamp | None = None

    def __post_init__(self) -> None:
        assert self.folded is not None or self.follows is not None, "half a row that follows none"


class Backfill(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a finished backfill: rows of every user up to this cut are in the store.

    log_id names the log itself, whatever its path; a backfill again raises the revision that its rows are stamped with.
    newer: users of whom the store held a newer row already, and kept it.
    """

    epoch: int
    cut: dict[int, int]
    users: int
    events: int
    log: str
    log_id: str = ""
    revision: int = 0
    newer: int = 0


class Progress(msgspec.Struct, frozen=True, kw_only=True):
    """How far a checkpoint's rows go: the positions committed (as `RowStore.positions`), and the backfill's record."""

    positions: dict[int, tuple[int, int]]
    backfill: Backfill | None

    @property
    def begun(self) -> bool:
        """Whether anything says that users without a row have no events; in a store that was emptied nothing does."""
        # A stream that has begun commits -1, the position before the first, and has put nothing by then.
        return self.backfill is not None or any(offset >= 0 for _, offset in self.positions.values())


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong with a store, and what to do. refused: nothing is written to such a store."""

    what: str
    remedy: str
    refused: bool = False


class RowStore(Protocol):
    """Rows by (checkpoint, user), fenced by their stamps.

    Raises UnavailableError while the store does not answer, another StoreError when it cannot be used. Safe to share
    between threads, picklable (the copy opens the store anew), usable after a fork.
    """

    def get_rows(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[RowBytes | None]:
        """The rows in the order of user_ids, in one read; None for absent and expired users."""
        ...

    def get_stamps(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[Stamp | None]:
        """The rows' stamps, as `get_rows` has the rows: a few bytes for each user."""
        ...

    def reading(
        self, checkpoint_id: str, user_ids: Sequence[str], take: TakeRows, until_s: float | None = None
    ) -> Generator[None, None, None]:
        """`get_rows` for who has a deadline: it yields where it may take long, and at until_s (by time.monotonic).

        The rest may then be another thread's (`run_out`). `take` gets the rows in parts as they come, each with the
        place of its first; and none of them when they are asked for, since there is time then. A try that failed
        begins again, and only at the end is it sure that they are this store's.
        """
        ...

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        """Compare and set, each row atomically; False where the fence refused.

        After an UnavailableError any of the puts may have been done; asking again is safe.
        """
        ...

    def count_rows(self, checkpoint_id: str) -> int:
        """How many users have a row; expired ones are not counted."""
        ...

    def delete_user(self, user_id: str) -> int:
        """Erase the user's rows of every checkpoint; how many there were."""
        ...

    def delete_row(self, checkpoint_id: str, user_id: str, stamp: Stamp) -> bool:
        """Erase the row that has this very stamp, and what else is left of one that went; False where none had it."""
        ...

    def delete_checkpoint(self, checkpoint_id: str) -> int:
        """Erase the checkpoint's rows, positions, log and backfill record; how many rows there were."""
        ...

    def positions(self, checkpoint_id: str) -> dict[int, tuple[int, int]]:
        """Committed (epoch, offset) by partition: every event at or below it is in the rows."""
        ...

    def commit_positions(self, checkpoint_id: str, epoch: int, offsets: Mapping[int, int]) -> None:
        """Raise the committed offsets; a lower (epoch, offset) than the stored one is ignored."""
        ...

    def bind_log(self, checkpoint_id: str, epoch: int, log: str) -> str:
        """The log that the checkpoint's rows of this epoch are made from: this one, if none was named yet."""
        ...

    def backfill(self, checkpoint_id: str) -> Backfill | None: ...

    def record_backfill(self, checkpoint_id: str, backfill: Backfill) -> None: ...

    def progress(self, checkpoint_id: str) -> Progress:
        """What `positions` and `backfill` say, for readers: it begins no writing, and changes nothing."""
        ...

    def checkpoint_ids(self) -> list[str]:
        """The checkpoints that have, or had, rows here."""
        ...

    def close(self) -> None:
        """Give the connections back; a later call opens the store anew, as another store if it is one by then."""
        ...

    def remove(self) -> None:
        """Erase the store: every checkpoint's rows, positions and records."""
        ...


def run_out(steps: Generator[None, None, Result]) -> Result:
    """Do the rest of these steps, however long they take."""
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def require_filled(rows: RowStore, checkpoint_id: str) -> None:
    """Raises StoreError while the store holds nothing of the checkpoint, UnavailableError if it does not answer."""
    if not rows.progress(checkpoint_id).begun:
        raise StoreError(
            f"the online store holds neither a backfill nor positions of checkpoint {checkpoint_id}: it was emptied, "
            "or is another one; run vql backfill"
        )


def bind_topic(rows: RowStore, checkpoint_id: str, epoch: int, topic_id: str, partitions: int) -> None:
    """Make rows of this epoch from this Kafka topic, and from no other: one created again holds other records.

    Raises StoreError when they are made from another already.
    """
    named = f"the Kafka topic of id {topic_id} and {partitions} partitions"
    bound = rows.bind_log(checkpoint_id, epoch, named)
    if bound != named:
        raise StoreError(
            f"the rows of epoch {epoch} are made from {bound}, and this is {named}; it was created again or "
            "re-partitioned: raise the epoch, ingest it and run vql backfill"
        )


def whole_put(user_id: str, row: Row) -> RowPut:
    """The put of a row that was folded from the user's first event on: any older row may be replaced."""
    (put,) = whole_puts([user_id], [row])
    return put


def whole_puts(user_ids: Sequence[str], rows: Sequence[Row]) -> list[RowPut]:
    """`whole_put` of several users."""
    return [
        RowPut(user_id=user_id, stamp=row.stamp, recent=recent, folded=row.folded_data)
        for user_id, row, recent in zip(user_ids, rows, _encoded_recents(rows), strict=True)
    ]


def row_puts(user_ids: Sequence[str], rows: Sequence[Row], stored: Sequence[Row | None]) -> list[RowPut]:
    """The puts that bring the store to these users' rows from the stored ones (None: no row).

    A put has a folded part only if that changed.
    """
    return [
        RowPut(
            user_id=user_id,
            stamp=row.stamp,
            recent=recent,
            folded=None if before is not None and row.folded_data is before.folded_data else row.folded_data,
            follows=_nothing(row.stamp) if before is None else before.stamp,
        )
        for user_id, row, before, recent in zip(user_ids, rows, stored, _encoded_recents(rows), strict=True)
    ]


def _encoded_recents(rows: Sequence[Row]) -> list[bytes]:
    if not rows:
        return []
    return encode_recents(rows[0].spec.checkpoint_id, [row.stamp for row in rows], [row.recent_data for row in rows])


def _nothing(stamp: Stamp) -> Stamp:
    return Stamp(epoch=stamp.epoch, partition=stamp.partition, offset=-1)
