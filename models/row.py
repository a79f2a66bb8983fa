"""A user's row: the folded cache, the recent events beside it, and the one rule that keeps both exact.

The row is the state. Every writer (stream, backfill, repair) calls `advance`: events at or below the stamp are
skipped, repeats and what a tombstone erases are left out (`models.recent`), the rest are appended to `recent`, and
whenever `recent` holds 2 W events the oldest W are folded. What is folded therefore depends only on the sequence of
accepted events, never on how it was cut into batches: a stream and a backfill build the same row. With W = 0 every
event is folded at once.

An erased user's row stays, empty and stamped with the tombstone: were it gone, a slow writer could bring back what
it read before.

Reading is the inverse: the user's cache is `folded` with `recent` folded in (`whole_cache`). Where a checkpoint counts
(`models.counts`), the counts of the same events go the same way (`whole_counts`).
Knows items only as indices of an item table. Shapes: as in `cache`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Int64
from msgspec.structs import replace

from models import counts
from models.cache import Cache, CacheSpec, EncodedEvents, empty, fold
from models.counts import CountedEvents, CountPlan
from models.errors import TableBehindError, WireError
from models.item_table import ItemTable
from models.recent import accept
from models.wire import (
    FOLDED_MAGIC,
    OFFSET_MAX,
    RECENT,
    Stamp,
    decode_counts,
    decode_folded,
    decode_recent,
    encode_folded,
    encode_recents,
    read_header,
    recent_actions,
    recent_offsets,
    recent_times,
)


class RowBytes(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A row as the store keeps it: two byte strings that are written and read together."""

    folded: bytes
    recent: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.folded) + len(self.recent)


class Row(msgspec.Struct, frozen=True, kw_only=True, eq=False, gc=False):
    """A user's state: `folded` up to folded_stamp, then `recent` up to `stamp`.

    The folded part stays encoded: most writes append to `recent` and never look inside it. recent_data are the
    records (dtype wire.RECENT), one after another.
    """

    spec: CacheSpec
    folded_data: bytes
    folded_stamp: Stamp
    folded_count: int
    recent_data: bytes
    stamp: Stamp

    @property
    def recent(self) -> np.ndarray:
        """The recent events (dtype wire.RECENT, read-only)."""
        return np.frombuffer(self.recent_data, RECENT)

    @property
    def folded(self) -> Cache:
        """The folded part, decoded. Raises WireError when its sections are malformed."""
        return decode_folded(self.folded_data, self.spec)[0]

    @property
    def count(self) -> int:
        """Events in the row, each once."""
        return self.folded_count + len(self.recent_data) // RECENT.itemsize

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, nearly."""
        return len(self.folded_data) + len(self.recent_data)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """What a writer needs of a checkpoint: the sizes, the window W, the item table, and what it counts, if anything.

    newest: of the recent events, how many a ranker attends one by one. count_spec: the counts as a cache; None for a
    checkpoint that does not count.
    """

    spec: CacheSpec
    window: int
    table: ItemTable
    counting: CountPlan | None = None
    newest: int = 0
    count_spec: CacheSpec | None = field(init=False)

    def __post_init__(self) -> None:
        # Made once: a row is read in less time than it takes to make it anew.
        spec = None if self.counting is None else self.counting.spec(self.spec.checkpoint_id)
        object.__setattr__(self, "count_spec", spec)

    def encode(self, recent: np.ndarray) -> EncodedEvents:
        """Look the events' items and actions up in the table.

        Raises TableBehindError for an item beyond the table: another writer's is newer.
        """
        item_N = self._items(recent)
        return EncodedEvents(
            code_NG=self.table.code_MG[item_N],
            value_NHD=self.table.value_MHD[item_N] + self.table.action_value_AHD[recent_actions(recent)],
            time_ms_N=recent_times(recent),
            weight_N=recent["weight"].astype(np.float32),
        )

    def encode_counted(self, recent: np.ndarray) -> CountedEvents:
        """Look the events' cells up. Raises TableBehindError as `encode`."""
        return CountedEvents(
            cell_NQ=self.table.cell_MQ[self._items(recent)],
            time_ms_N=recent_times(recent),
            weight_N=recent["weight"].astype(np.float32),
        )

    def _items(self, recent: np.ndarray) -> np.ndarray:
        item_N = recent["item"]
        if len(item_N) and int(item_N.max()) >= len(self.table):
            raise TableBehindError(
                f"a row holds item {int(item_N.max())}, but this item table ends at {len(self.table) - 1}: "
                "it has grown since; start again"
            )
        return item_N


def new_row(spec: CacheSpec, epoch: int, partition: int, revision: int = 0) -> Row:
    """A user of whom nothing is known: complete up to the position before the first."""
    return empty_row(spec, Stamp(epoch=epoch, partition=partition, offset=-1, revision=revision))


def empty_row(spec: CacheSpec, stamp: Stamp) -> Row:
    """The row of a user of whom nothing at or below the stamp counts."""
    return Row(
        spec=spec,
        folded_data=encode_folded(empty(spec), stamp),
        folded_stamp=stamp,
        folded_count=0,
        recent_data=b"",
        stamp=stamp,
    )


class Left(NamedTuple):
    """Records that `advance` did not add: already in the row, a producer's repeats, tombstones and what they erased."""

    skipped: int = 0
    repeated: int = 0
    erased: int = 0


class Advanced(NamedTuple):
    """The rows of U users after their events, and how many of each user's were left out (as in `Left`)."""

    rows: list[Row]
    skipped_U: np.ndarray
    repeated_U: np.ndarray
    erased_U: np.ndarray


def advance(row: Row, events: np.ndarray, position: Stamp, using: Fold) -> tuple[Row, Left]:
    """`advance_users` of one user."""
    (row,), *left = advance_users([row], events, np.array([len(events)]), position, using)
    return row, Left(*(int(count) for (count,) in left))


def advance_users(
    rows: Sequence[Row], event_N: np.ndarray, end_U: Int64[np.ndarray, "U"], position: Stamp, using: Fold
) -> Advanced:
    """Each user's row with the user's events, and how many were left out.

    event_N (dtype RECENT) are the events of one user after another, each user's with rising offsets up to end_U.
    `position` carries their epoch and partition; its offset is not used, nor its partition for a row of the same epoch:
    a user has one partition within an epoch, and rows of several may be advanced together. Events at or below a row's
    stamp are already in it. A row without new events comes back unchanged (the same object), and one whose folded part
    did not change keeps the same folded_data. The stamp is that of the last event added, or of a tombstone.
    Raises WireError when a folded part to be changed is malformed.
    """
    epoch, size, window = position.epoch, RECENT.itemsize, using.window
    # Offsets of two epochs do not compare: what is left of the old one is folded under its own stamp.
    bases = [_fold_oldest(row, row.recent, using) if row.stamp.epoch < epoch else row for row in rows]
    accepted = accept(
        np.frombuffer(b"".join([row.recent_data for row in bases]), RECENT),
        np.cumsum([len(row.recent_data) for row in bases]) // size,
        event_N,
        end_U,
        np.array([_covered(row.stamp, epoch) for row in rows]),
        window,
    )
    added_U = np.diff(end_U, prepend=0) - accepted.skipped_U - accepted.repeated_U - accepted.erased_U
    data, ends = accepted.record_N.tobytes(), (accepted.end_U * size).tolist()
    last_U = np.zeros(len(rows), np.int64)
    last_U[added_U > 0] = recent_offsets(accepted.record_N[accepted.end_U[added_U > 0] - 1])
    results = list(rows)
    for u in np.flatnonzero(accepted.erased_U).tolist():
        tombstone = end_U[u] - added_U[u] - accepted.repeated_U[u] - 1
        at = _at(position, int(event_N["position"][tombstone]) >> 16, rows[u].stamp)
        results[u] = bases[u] = empty_row(using.spec, at)
    columns = zip(bases, added_U.tolist(), last_U.tolist(), [0, *ends], ends, strict=False)
    for u, (base, added, last, start, end) in enumerate(columns):
        if added:
            row = Row(
                spec=base.spec,
                folded_data=base.folded_data,
                folded_stamp=base.folded_stamp,
                folded_count=base.folded_count,
                recent_data=data[start:end],
                stamp=_at(position, last, base.stamp),
            )
            ripe = _ripe((end - start) // size, window)
            results[u] = _fold_oldest(row, row.recent[:ripe], using) if ripe else row
    return Advanced(results, accepted.skipped_U, accepted.repeated_U, accepted.erased_U)


def _at(position: Stamp, offset: int, before: Stamp) -> Stamp:
    """The stamp at this offset of the row that was stamped `before`."""
    partition = before.partition if before.epoch == position.epoch else position.partition
    return Stamp(epoch=position.epoch, partition=partition, offset=offset, revision=before.revision)


def _covered(stamp: Stamp, epoch: int) -> int:
    """The last offset of the epoch that is in a row with this stamp."""
    if stamp.covers(epoch, stamp.offset):
        return stamp.offset if stamp.epoch == epoch else OFFSET_MAX
    return -1


def _fold_oldest(row: Row, ripe: np.ndarray, using: Fold) -> Row:
    """Move `ripe`, the oldest recent events, into the folded part."""
    if len(ripe) == 0:
        return row
    stamp = replace(row.stamp, offset=int(recent_offsets(ripe[-1:])[0]))
    folded = fold(row.folded, using.encode(ripe))
    counted = _counts(row, ripe, using)
    return Row(
        spec=row.spec,
        folded_data=encode_folded(folded, stamp, counted),
        folded_stamp=stamp,
        folded_count=folded.count,
        recent_data=row.recent_data[ripe.nbytes :],
        stamp=row.stamp,
    )


def whole_cache(row: Row, using: Fold) -> Cache:
    """The cache of every event of the row."""
    return fold(row.folded, using.encode(row.recent))


def whole_counts(row: Row, using: Fold) -> Cache | None:
    """The counts of every event of the row; None for a checkpoint that does not count."""
    return _counts(row, row.recent, using)


def _counts(row: Row, events: np.ndarray, using: Fold) -> Cache | None:
    """The counts of what is folded and of these events."""
    spec = using.count_spec
    if spec is None:
        return None
    return counts.fold(decode_counts(row.folded_data, spec), using.encode_counted(events))


def encode_row(row: Row) -> RowBytes:
    """The row as the store keeps it."""
    (recent,) = encode_recents(row.spec.checkpoint_id, [row.stamp], [row.recent_data])
    return RowBytes(folded=row.folded_data, recent=recent)


def erased_row(checkpoint_id: str, stamp: Stamp) -> RowBytes:
    """An empty row's bytes, for who has no checkpoint at hand: without entries they are the same for all sizes."""
    spec = CacheSpec(checkpoint_id=checkpoint_id, groups=1, codewords=1, value_width=1, rate_HR=np.zeros((1, 1)))
    return encode_row(empty_row(spec, stamp))


def decode_row(data: RowBytes, spec: CacheSpec) -> Row:
    """Raises WireError when a part is damaged or they are of two writes, ForeignRowError for another checkpoint's."""
    header = read_header(data.folded, FOLDED_MAGIC, spec.checkpoint_id)
    recent, stamp = decode_recent(data.recent, spec.checkpoint_id)
    folded = header.stamp
    oldest = int(recent["position"][0]) >> 16 if len(recent) else OFFSET_MAX
    if (folded.epoch, folded.offset) > (stamp.epoch, stamp.offset) or (
        folded.epoch == stamp.epoch and oldest <= folded.offset
    ):
        raise WireError(f"folded up to {folded}, but the recent events begin at {oldest} and end at {stamp}")
    return Row(
        spec=spec,
        folded_data=data.folded,
        folded_stamp=header.stamp,
        folded_count=header.event_count,
        recent_data=recent.tobytes(),
        stamp=stamp,
    )


def _ripe(events: int, window: int) -> int:
    """How many of the oldest events to fold: whole windows, leaving W to 2W - 1 events."""
    if window == 0:
        return events
    return max(0, (events // window - 1) * window)
