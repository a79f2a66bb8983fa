"""The update of rows: read the rows of a batch's users, fold the batch in, put them back if newer.

A put that the fence refuses means that another writer was first: the row is read again and the update redone, and
what the other writer folded is skipped by the stamp. A stored row that is damaged, or that another partition wrote,
stops the stream: going on would drop that user's history.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
import pandas as pd
from apache_beam.metrics import Metrics

from feature_repo.store import RowPut, RowStore, row_put
from models.errors import InputError, StoreError, WireError
from models.row import Fold, Row, RowBytes, advance, decode_row, new_row
from models.wire import Stamp
from pipelines.encode import EncodedBatch
from pipelines.metrics import process_metrics
from pipelines.worker import CheckpointRef, RowsHandle, opened_checkpoint, opened_rows

TRIES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateCounts:
    """What an update did. Every event is folded or skipped once, however often its put was redone."""

    events_folded: int = 0
    events_skipped: int = 0
    conflicts: int = 0
    rows_written: int = 0
    bytes_written: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class UserEvents:
    """The events of one user in a batch, in log order (dtype wire.RECENT)."""

    user_id: str
    events: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class _Step:
    """One user's row before and after: `put` is None when nothing was new."""

    user: UserEvents
    skipped: int
    put: RowPut | None


def update_rows(rows: RowStore, using: Fold, batch: EncodedBatch) -> UpdateCounts:
    """Bring the rows of the batch's users up to the batch.

    Raises WireError for a damaged stored row, InputError for a user whose row another partition wrote, StoreError
    when other writers were first TRIES times.
    """
    checkpoint_id = using.spec.checkpoint_id
    position = Stamp(epoch=batch.epoch, partition=batch.partition, offset=-1)
    waiting = by_user(batch)
    folded = skipped = conflicts = written = size_bytes = 0
    for _ in range(TRIES):
        stored = rows.get_rows(checkpoint_id, [user.user_id for user in waiting])
        steps = [_step(user, data, position, using) for user, data in zip(waiting, stored, strict=True)]
        skipped += sum(step.skipped for step in steps if step.put is None)
        puts = [step for step in steps if step.put is not None]
        accepted = rows.put_rows(checkpoint_id, [step.put for step in puts]) if puts else []
        waiting = []
        for step, done in zip(puts, accepted, strict=True):
            if done:
                folded += len(step.user.events) - step.skipped
                skipped += step.skipped
                written += 1
                size_bytes += len(step.put.recent) + len(step.put.folded or b"")
            else:
                conflicts += 1
                waiting.append(step.user)
        if not waiting:
            return UpdateCounts(
                events_folded=folded,
                events_skipped=skipped,
                conflicts=conflicts,
                rows_written=written,
                bytes_written=size_bytes,
            )
    raise StoreError(f"the row of user {waiting[0].user_id!r} was refused {TRIES} times; how many streams write it?")


def by_user(batch: EncodedBatch) -> list[UserEvents]:
    """The batch's events by user, each in log order."""
    code_N, user_ids = pd.factorize(np.array(batch.user_ids, object))
    order_N = np.argsort(code_N, kind="stable")
    ends = np.cumsum(np.bincount(code_N, minlength=len(user_ids))).tolist()
    ordered = batch.recent[order_N]
    return [
        UserEvents(user_id=user_id, events=ordered[start:end])
        for user_id, start, end in zip(user_ids, [0, *ends], ends, strict=False)
    ]


def _step(user: UserEvents, data: RowBytes | None, position: Stamp, using: Fold) -> _Step:
    stored = None if data is None else _stored_row(user.user_id, data, position, using)
    before = new_row(using.spec, position.epoch, position.partition) if stored is None else stored
    with _explaining(user.user_id):
        after, left = advance(before, user.events, position, using)
    put = None if after is before else row_put(user.user_id, after, stored)
    return _Step(user=user, skipped=sum(left), put=put)


def _stored_row(user_id: str, data: RowBytes, position: Stamp, using: Fold) -> Row:
    with _explaining(user_id):
        row = decode_row(data, using.spec)
    # Offsets of two partitions cannot be compared: the stamp would skip events that the row does not hold.
    if row.stamp.epoch == position.epoch and row.stamp.partition != position.partition:
        raise InputError(
            f"user {user_id!r} moved from partition {row.stamp.partition} to {position.partition} within epoch "
            f"{position.epoch}: the log was re-partitioned; raise its epoch and run the backfill again"
        )
    return row


@contextmanager
def _explaining(user_id: str) -> Iterator[None]:
    """Say whose stored row is damaged, and what to do."""
    try:
        yield
    except WireError as error:
        raise type(error)(
            f"the stored row of user {user_id!r} cannot be used ({error}); repair it from the log, then start again"
        ) from error


class UpdateRows(beam.DoFn):
    """`update_rows` with the store and the checkpoint of this process."""

    def __init__(self, checkpoint: CheckpointRef, store: RowsHandle) -> None:
        self._ref = checkpoint
        self._store = store
        self._counters = {name: Metrics.counter("vql", name) for name in UpdateCounts.__dataclass_fields__}

    def setup(self) -> None:
        self._fold = opened_checkpoint(self._ref).fold
        self._rows = opened_rows(self._store)
        self._metrics = process_metrics()

    def process(self, batch: EncodedBatch) -> Iterator[UpdateCounts]:
        counts = update_rows(self._rows, self._fold, batch)
        for name, counter in self._counters.items():
            counter.inc(getattr(counts, name))
        self._metrics.observe(counts)
        self._metrics.put(batch.partition)
        yield counts
