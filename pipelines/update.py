"""The update of rows: read the rows of a batch's users, fold the batch in, put them back if newer.

Rows come from the worker's own cache where it holds them, else from the store. A put that the fence refuses means
that another writer was first: the row is read from the store and the update redone, and what the other writer folded
is skipped by the stamp. A stored row that is damaged, or that another partition wrote, stops the stream: going on
would drop that user's history.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import apache_beam as beam
import msgspec
import numpy as np
import pyarrow as pa
from apache_beam.metrics import Metrics

from feature_repo.forgotten import ForgottenRef
from feature_repo.patient_rows import PatientRows
from feature_repo.store import RowStore, row_puts
from models.errors import InputError, StoreError, TableBehindError, WireError
from models.forgotten import NOBODY_FORGOTTEN, Forgotten
from models.row import Advanced, Fold, Row, advance, advance_users, decode_row, empty_row, new_row
from models.wire import Stamp
from pipelines.encode import EncodedBatch
from pipelines.metrics import process_metrics
from pipelines.row_cache import ROW_CACHE_BYTES, RowCache
from pipelines.worker import (
    CheckpointRef,
    RowsHandle,
    opened_checkpoint,
    opened_forgotten,
    opened_row_cache,
    opened_rows,
    stop_requested,
)

TRIES = 20


@dataclass(frozen=True, kw_only=True, slots=True)
class UpdateCounts:
    """What an update did. Every record is folded, skipped, repeated or erased once, however often its put was redone.

    events_repeated: a producer sent them twice. events_erased: tombstones, and what they erased of their own batch.
    A put that was done although its answer was lost counts as a conflict, and its events as skipped.
    row_bytes: the size of each row that was put.
    """

    events_folded: int = 0
    events_skipped: int = 0
    events_repeated: int = 0
    events_erased: int = 0
    conflicts: int = 0
    retries: int = 0
    rows_written: int = 0
    bytes_written: int = 0
    cache_hits: int = 0
    cache_misses: int = 0
    row_bytes: tuple[int, ...] = field(default=(), compare=False)


COUNTED = tuple(each.name for each in fields(UpdateCounts) if each.name != "row_bytes")


class UsersEvents(NamedTuple):
    """The events of U users (dtype wire.RECENT), one user after another, each user's in log order up to end_U."""

    user_ids: list[str]
    event_N: np.ndarray
    end_U: np.ndarray

    def only(self, places: Sequence[int]) -> UsersEvents:
        """These users alone."""
        start_U = np.concatenate([[0], self.end_U[:-1]])
        events = [self.event_N[start_U[u] : self.end_U[u]] for u in places]
        return UsersEvents([self.user_ids[u] for u in places], np.concatenate(events), np.cumsum([*map(len, events)]))


def update_rows(
    rows: RowStore,
    using: Fold,
    batch: EncodedBatch,
    cache: RowCache | None = None,
    forgotten: Forgotten = NOBODY_FORGOTTEN,
) -> UpdateCounts:
    """Bring the rows of the batch's users up to the batch. Of a forgotten user without a row, what is later begins one.

    Raises WireError for a damaged stored row, InputError for a user whose row another partition wrote, StoreError
    when other writers were first TRIES times, TableBehindError when a row holds an item that the table lacks.
    """
    checkpoint_id = using.spec.checkpoint_id
    position = Stamp(epoch=batch.epoch, partition=batch.partition, offset=-1)
    nobody = new_row(using.spec, batch.epoch, batch.partition)
    cache = RowCache(0) if cache is None else cache
    waiting, left_out = by_user(batch), np.zeros(3, np.int64)
    conflicts = size_bytes = hits = misses = 0
    row_bytes: list[int] = []
    for _ in range(TRIES):
        stored = cache.get(waiting.user_ids)
        lacking = [u for u, row in enumerate(stored) if row is None]
        hits, misses = hits + len(stored) - len(lacking), misses + len(lacking)
        for u, row in zip(lacking, _read(rows, [waiting.user_ids[u] for u in lacking], using), strict=True):
            stored[u] = row
        _refuse_moved(waiting.user_ids, stored, position)
        before = [
            row or _begun(nobody, forgotten.offset(user_id, batch.epoch, batch.partition))
            for user_id, row in zip(waiting.user_ids, stored, strict=True)
        ]
        after, *left = _advance(waiting, before, position, using)
        changed = [u for u, row in enumerate(after) if row is not before[u]]
        puts = row_puts(*([column[u] for u in changed] for column in (waiting.user_ids, after, stored)))
        accepted = rows.put_rows(checkpoint_id, puts) if puts else []
        for u, put, done in zip(changed, puts, accepted, strict=True):
            if done:
                size_bytes += len(put.recent) + len(put.folded or b"")
                row_bytes.append(len(put.recent) + len(after[u].folded_data))
        refused = [u for u, done in zip(changed, accepted, strict=True) if not done]
        conflicts += len(refused)
        left_out += np.sum(left, axis=1) - np.sum(left, axis=1, where=np.isin(np.arange(len(after)), refused))
        cache.keep(waiting.user_ids, after)
        cache.drop([waiting.user_ids[u] for u in refused])
        if not refused:
            skipped, repeated, erased = left_out.tolist()
            return UpdateCounts(
                events_folded=len(batch.recent) - skipped - repeated - erased,
                events_skipped=skipped,
                events_repeated=repeated,
                events_erased=erased,
                conflicts=conflicts,
                rows_written=len(row_bytes),
                bytes_written=size_bytes,
                cache_hits=hits,
                cache_misses=misses,
                row_bytes=tuple(row_bytes),
            )
        waiting = waiting.only(refused)
    raise StoreError(f"the row of user {waiting.user_ids[0]!r} was refused {TRIES} times; how many streams write it?")


def by_user(batch: EncodedBatch) -> UsersEvents:
    """The batch's events by user."""
    users = pa.array(batch.user_ids, pa.string()).dictionary_encode()
    code_N = users.indices.to_numpy()
    order_N = np.argsort(code_N, kind="stable")
    return UsersEvents(users.dictionary.to_pylist(), batch.recent[order_N], np.cumsum(np.bincount(code_N)))


def _begun(nobody: Row, forgotten_offset: int) -> Row:
    """What a user without a row begins from: everything up to the offset is forgotten, as a tombstone's row says."""
    if forgotten_offset < 0:
        return nobody
    return empty_row(nobody.spec, msgspec.structs.replace(nobody.stamp, offset=forgotten_offset))


def _read(rows: RowStore, user_ids: Sequence[str], using: Fold) -> list[Row | None]:
    """The stored rows; the store is not asked for nobody's."""
    found: list[Row | None] = []
    stored = rows.get_rows(using.spec.checkpoint_id, user_ids) if user_ids else []
    for user_id, data in zip(user_ids, stored, strict=True):
        try:
            found.append(None if data is None else decode_row(data, using.spec))
        except WireError as error:
            raise _explained(user_id, error) from error
    return found


def _advance(users: UsersEvents, rows: Sequence[Row], position: Stamp, using: Fold) -> Advanced:
    try:
        return advance_users(rows, users.event_N, users.end_U, position, using)
    except WireError:
        # Whose row it was is worth a second look.
        for u, row in enumerate(rows):
            try:
                advance(row, users.only([u]).event_N, position, using)
            except WireError as error:
                raise _explained(users.user_ids[u], error) from error
        raise


def _explained(user_id: str, error: WireError) -> WireError:
    """Whose stored row is damaged, and what to do."""
    return type(error)(
        f"the stored row of user {user_id!r} cannot be used ({error}); repair it from the log, then start again"
    )


def _refuse_moved(user_ids: Sequence[str], rows: Sequence[Row | None], position: Stamp) -> None:
    """Offsets of two partitions cannot be compared: the stamp would skip events that the row does not hold."""
    for user_id, row in zip(user_ids, rows, strict=True):
        if row is not None and row.stamp.partition != position.partition and row.stamp.epoch == position.epoch:
            raise InputError(
                f"user {user_id!r} moved from partition {row.stamp.partition} to {position.partition} within epoch "
                f"{position.epoch}: the log was re-partitioned; raise its epoch and run the backfill again"
            )


class UpdateRows(beam.DoFn):
    """`update_rows` with the store, the row cache and the checkpoint of this process."""

    def __init__(
        self,
        checkpoint: CheckpointRef,
        store: RowsHandle,
        row_cache_bytes: int = ROW_CACHE_BYTES,
        forgotten: ForgottenRef | None = None,
    ) -> None:
        self._ref = checkpoint
        self._forgotten_ref = forgotten
        self._store = store
        self._row_cache_bytes = row_cache_bytes
        self._counters = {name: Metrics.counter("vql", name) for name in COUNTED}
        self._row_bytes = Metrics.counter("vql", "row_bytes")

    def setup(self) -> None:
        self._opened = opened_checkpoint(self._ref)
        self._cache = opened_row_cache(self._store, self._ref.checkpoint_id, self._row_cache_bytes)
        self._rows = PatientRows(opened_rows(self._store), stop_requested)
        self._metrics = process_metrics()
        self._forgotten = None if self._forgotten_ref is None else opened_forgotten(self._forgotten_ref)

    def process(self, batch: EncodedBatch) -> Iterator[UpdateCounts]:
        forgotten = NOBODY_FORGOTTEN if self._forgotten is None else self._forgotten.known
        try:
            counts = update_rows(self._rows, self._opened.fold, batch, self._cache, forgotten)
        except TableBehindError:
            # Another writer met an item that was encoded since this process looked last.
            counts = update_rows(self._rows, self._opened.reload(), batch, self._cache, forgotten)
        counts, self._rows.retries = replace(counts, retries=self._rows.retries), 0
        for name, counter in self._counters.items():
            counter.inc(getattr(counts, name))
        self._row_bytes.inc(sum(counts.row_bytes))
        self._metrics.observe(counts)
        self._metrics.put(batch.partition)
        yield counts
