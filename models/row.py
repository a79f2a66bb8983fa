"""A user's row: the folded cache, the recent events beside it, and the one rule that keeps both exact.

The row is the state. Every writer (stream, backfill, repair) calls `advance`: events at or below the stamp are
skipped, repeats and what a tombstone erases are left out (`models.recent`), the rest are appended to `recent`, and
whenever `recent` holds 2 W events the oldest W are folded. What is folded therefore depends only on the sequence of
accepted events, never on how it was cut into batches: a stream and a backfill build the same row. With W = 0 every
event is folded at once.

An erased user's row stays, empty and stamped with the tombstone: were it gone, a slow writer could bring back what
it read before.

Reading is the inverse: the user's cache is `folded` with `recent` folded in (`whole_cache`).
Knows items only as indices of an item table. Shapes: as in `cache`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import takewhile
from typing import NamedTuple

import numpy as np

from models.cache import Cache, CacheSpec, EncodedEvents, empty, fold
from models.errors import CheckpointError
from models.item_table import ItemTable
from models.recent import accept
from models.wire import (
    FOLDED_MAGIC,
    RECENT,
    Stamp,
    decode_folded,
    decode_recent,
    encode_folded,
    encode_recent,
    read_header,
    recent_actions,
    recent_offsets,
    recent_times,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RowBytes:
    """A row as the store keeps it: two byte strings that are written and read together."""

    folded: bytes
    recent: bytes

    @property
    def size_bytes(self) -> int:
        return len(self.folded) + len(self.recent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """A user's state: `folded` up to folded_stamp, then `recent` (dtype wire.RECENT) up to `stamp`.

    The folded part stays encoded: most writes append to `recent` and never look inside it.
    """

    spec: CacheSpec
    folded_data: bytes
    folded_stamp: Stamp
    folded_count: int
    recent: np.ndarray
    stamp: Stamp

    @property
    def folded(self) -> Cache:
        """The folded part, decoded. Raises WireError when its sections are malformed."""
        return decode_folded(self.folded_data, self.spec)[0]

    @property
    def count(self) -> int:
        """Events in the row, each once."""
        return self.folded_count + len(self.recent)


@dataclass(frozen=True, kw_only=True, slots=True)
class Fold:
    """What a writer needs of a checkpoint: the sizes, the window W and the item table."""

    spec: CacheSpec
    window: int
    table: ItemTable

    def encode(self, recent: np.ndarray) -> EncodedEvents:
        """Look the events' items and actions up in the table.

        Raises CheckpointError for an item beyond the table: another writer's is newer.
        """
        item_N = recent["item"]
        if len(item_N) and int(item_N.max()) >= len(self.table):
            raise CheckpointError(
                f"a row holds item {int(item_N.max())}, but this item table ends at {len(self.table) - 1}: "
                "it has grown since; start again"
            )
        return EncodedEvents(
            code_NG=self.table.code_MG[item_N],
            value_NHD=self.table.value_MHD[item_N] + self.table.action_value_AHD[recent_actions(recent)],
            time_ms_N=recent_times(recent),
            weight_N=recent["weight"].astype(np.float32),
        )


def new_row(spec: CacheSpec, epoch: int, partition: int, revision: int = 0) -> Row:
    """A user of whom nothing is known: complete up to the position before the first."""
    return _empty_row(spec, Stamp(epoch=epoch, partition=partition, offset=-1, revision=revision))


def _empty_row(spec: CacheSpec, stamp: Stamp) -> Row:
    return Row(
        spec=spec,
        folded_data=encode_folded(empty(spec), stamp),
        folded_stamp=stamp,
        folded_count=0,
        recent=np.empty(0, RECENT),
        stamp=stamp,
    )


class Left(NamedTuple):
    """Records that `advance` did not add: already in the row, a producer's repeats, tombstones and what they erased."""

    skipped: int = 0
    repeated: int = 0
    erased: int = 0


def advance(row: Row, events: np.ndarray, position: Stamp, using: Fold) -> tuple[Row, Left]:
    """The row with these events (dtype RECENT, one user, rising offsets), and how many were left out.

    `position` carries the epoch and partition of the events; its offset is not used. Events at or below the row's
    stamp are already in it. A row without new events comes back unchanged (the same object), and one whose folded
    part did not change keeps the same folded_data. The stamp is that of the last event added, or of a tombstone.
    Raises WireError when a folded part to be changed is malformed.
    """
    skipped = _covered(row.stamp, position.epoch, events)
    fresh = events[skipped:]
    if len(fresh) == 0:
        return row, Left(skipped)
    if position.epoch != row.stamp.epoch:
        # Offsets of two epochs do not compare: what is left of the old one is folded under its own stamp.
        row = _fold_oldest(row, len(row.recent), using)
    added, repeated, tombstone = accept(row.recent, fresh, using.window)
    if tombstone >= 0:
        at = replace(position, offset=int(fresh["position"][tombstone]) >> 16, revision=row.stamp.revision)
        row = _empty_row(row.spec, at)
    left = Left(skipped, repeated, tombstone + 1)
    if len(added) == 0:
        return row, left
    last = int(added["position"][-1]) >> 16
    stamp = replace(position, offset=last, revision=row.stamp.revision)
    row = replace(row, recent=np.concatenate([row.recent, added]), stamp=stamp)
    return _fold_oldest(row, _ripe(len(row.recent), using.window), using), left


def _covered(stamp: Stamp, epoch: int, events: np.ndarray) -> int:
    """How many of the events, from the first on, are at or below the stamp."""
    if len(events) == 0 or not stamp.covers(epoch, int(events["position"][0]) >> 16):
        return 0
    covered = takewhile(lambda offset: stamp.covers(epoch, offset), recent_offsets(events).tolist())
    return sum(1 for _ in covered)


def _fold_oldest(row: Row, count: int, using: Fold) -> Row:
    """Move the oldest `count` recent events into the folded part."""
    if count == 0:
        return row
    ripe = row.recent[:count]
    stamp = replace(row.stamp, offset=int(recent_offsets(ripe[-1:])[0]))
    folded = fold(row.folded, using.encode(ripe))
    return replace(
        row,
        folded_data=encode_folded(folded, stamp),
        folded_stamp=stamp,
        folded_count=folded.count,
        recent=row.recent[count:],
    )


def whole_cache(row: Row, using: Fold) -> Cache:
    """The cache of every event of the row."""
    return fold(row.folded, using.encode(row.recent))


def encode_row(row: Row) -> RowBytes:
    """The row as the store keeps it."""
    return RowBytes(folded=row.folded_data, recent=encode_recent(row.spec.checkpoint_id, row.stamp, row.recent))


def decode_row(data: RowBytes, spec: CacheSpec) -> Row:
    """Raises WireError when either part is damaged, ForeignRowError when it belongs to another checkpoint."""
    header = read_header(data.folded, FOLDED_MAGIC, spec.checkpoint_id)
    recent, stamp = decode_recent(data.recent, spec.checkpoint_id)
    return Row(
        spec=spec,
        folded_data=data.folded,
        folded_stamp=header.stamp,
        folded_count=header.event_count,
        recent=recent,
        stamp=stamp,
    )


def _ripe(events: int, window: int) -> int:
    """How many of the oldest events to fold: whole windows, leaving W to 2W - 1 events."""
    if window == 0:
        return events
    return max(0, (events // window - 1) * window)
