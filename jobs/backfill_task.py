"""What a task of a backfill does: a stream of sorted events to rows, and the rows into the store at a paced rate.

It holds the users of one Arrow batch at a time, so a user of a million events needs no more memory than one of ten.
Knows Arrow's batches and the store, and nothing of Spark.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.patient_rows import PatientRows
from feature_repo.store import RowStore, whole_puts
from models.checkpoint import open_checkpoint
from models.errors import MismatchError, TableBehindError
from models.item_table import UNKNOWN
from models.row import Row, advance_users, new_row
from models.text_index import TextIndex
from models.wire import Stamp, pack_recent

# A put is a burst of work for the store, for which its readers wait: few rows.
ROWS_PER_PUT = 100


@dataclass(frozen=True, kw_only=True, slots=True)
class RowTask:
    """What the tasks of a backfill share: the checkpoint, where rows go, and what they are stamped with.

    items: how many the item table held when the backfill began. puts_per_s: rows of one task, 0 for no limit.
    """

    checkpoint: Path
    checkpoint_id: str
    items: int
    store: StoreHandle
    epoch: int
    revision: int
    puts_per_s: float


class Done(NamedTuple):
    """What a task did. newer: users of whom the store held a newer row, and kept it."""

    users: int
    events: int
    newer: int


def write_rows(task: RowTask, batches: Iterable[pa.RecordBatch]) -> Done:
    """Fold events that are sorted by (user, offset), and put the rows of their users.

    Raises MismatchError for another checkpoint at the path, TableBehindError for an item table that is too short,
    UnavailableError where the store stays away, and what the store raises.
    """
    opened, store = _opened_with(task), task.store.open()
    users = events = 0

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal events
        for batch in batches:
            events += batch.num_rows
            yield batch

    try:
        writer = RowWriter(PatientRows(store, threading.Event()), task.checkpoint_id, Pace(task.puts_per_s))
        rows = fold_users(counted(), opened, task.epoch, task.revision)
        while chunk := list(islice(rows, ROWS_PER_PUT)):
            users += len(chunk)
            writer.put(chunk)
    finally:
        store.close()
    return Done(users=users, events=events, newer=writer.newer)


def _opened_with(task: RowTask) -> Opened:
    """The checkpoint with an item table at least as long as the task was given."""
    opened = _opened(task.checkpoint, task.checkpoint_id)
    if len(opened.fold.table) < task.items and len(opened.reload().table) < task.items:
        raise TableBehindError(
            f"the item table of {task.checkpoint} had {task.items} items where the backfill began, and has "
            f"{len(opened.loaded.table)} here: wait until this machine has the same files"
        )
    return opened


@lru_cache(maxsize=1)
def _opened(path: Path, checkpoint_id: str) -> Opened:
    """The checkpoint, opened once per process, which works on many tasks."""
    checkpoint = open_checkpoint(path)
    if checkpoint.checkpoint_id != checkpoint_id:
        raise MismatchError(f"{path} is checkpoint {checkpoint.checkpoint_id}, not {checkpoint_id}; run it again")
    return Opened(checkpoint)


def fold_users(
    batches: Iterable[pa.RecordBatch], opened: Opened, epoch: int, revision: int = 0
) -> Iterator[tuple[str, Row]]:
    """Events sorted by (user, offset) to each user's row.

    A tombstone is a row of nulls: it becomes a record of weight 0, and erases what came before.
    """
    using = opened.fold
    items = TextIndex(using.table.index)
    actions = TextIndex({action: i for i, action in enumerate(opened.checkpoint.manifest.actions)})
    position = Stamp(epoch=epoch, partition=0, offset=-1)
    nobody = lru_cache(lambda partition: new_row(using.spec, epoch, partition, revision))
    last: tuple[str, Row] | None = None
    for batch in batches:
        if batch.num_rows == 0:
            continue
        runs = pc.run_end_encode(batch["user_id"])
        user_ids, end_U = runs.values.to_pylist(), runs.run_ends.to_numpy().astype(np.int64)
        rows = [nobody(partition) for partition in batch["partition"].to_numpy()[end_U - 1].tolist()]
        if last is not None:
            if last[0] == user_ids[0]:
                rows[0] = last[1]
            else:
                yield last
        advanced = advance_users(rows, _records(batch, items, actions), end_U, position, using).rows
        *whole, last = zip(user_ids, advanced, strict=True)
        yield from whole
    if last is not None:
        yield last


def _records(batch: pa.RecordBatch, items: TextIndex, actions: TextIndex) -> np.ndarray:
    """The batch's events as the records of a row; action 0 is "other"."""
    return pack_recent(
        batch["offset"].to_numpy(),
        batch["event_time_ms"].fill_null(0).to_numpy(),
        actions.find(batch["action"], otherwise=0),
        items.find(batch["item_id"], otherwise=UNKNOWN),
        batch["weight"].fill_null(0.0).to_numpy(),
        batch["event_hash"].fill_null(0).to_numpy(),
    )


class RowWriter:
    """Puts whole rows, unless the store has them already: a run that was killed, or another writer, was here."""

    def __init__(self, rows: RowStore | PatientRows, checkpoint_id: str, pace: Pace) -> None:
        self._rows = rows
        self._checkpoint_id = checkpoint_id
        self._pace = pace
        self.newer = 0

    def put(self, rows: Sequence[tuple[str, Row]]) -> None:
        """Returns when the store holds each of these rows, or a newer one."""
        waiting = self._lacking(rows)
        while waiting:
            self._pace.wait(len(waiting))
            user_ids, rows_U = zip(*waiting, strict=True)
            accepted = self._rows.put_rows(self._checkpoint_id, whole_puts(user_ids, rows_U))
            waiting = self._lacking([row for row, done in zip(waiting, accepted, strict=True) if not done])

    def _lacking(self, rows: Sequence[tuple[str, Row]]) -> list[tuple[str, Row]]:
        """Those of which the store has none, or an older one."""
        if not rows:
            return []
        held = self._rows.get_stamps(self._checkpoint_id, [user_id for user_id, _ in rows])
        lacking = []
        for stamp, (user_id, row) in zip(held, rows, strict=True):
            if stamp is None or stamp.order < row.stamp.order:
                lacking.append((user_id, row))
            elif stamp.order > row.stamp.order:
                self.newer += 1
        return lacking


class Pace:
    """Lets through so many a second, and never catches up with a burst; 0: all at once."""

    def __init__(
        self, per_s: float, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep
    ) -> None:
        self._per_s = per_s
        self._clock = clock
        self._sleep = sleep
        self._free_s = clock()

    def wait(self, count: int) -> None:
        """Return when `count` more may go."""
        if self._per_s == 0:
            return
        now_s = self._clock()
        if now_s < self._free_s:
            self._sleep(self._free_s - now_s)
        self._free_s = max(now_s, self._free_s) + count / self._per_s
