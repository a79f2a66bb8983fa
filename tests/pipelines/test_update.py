from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from msgspec.structs import replace

from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowPut, whole_put
from models.checkpoint import Checkpoint
from models.errors import ForeignRowError, InputError, StoreError, WireError
from models.event import Event
from models.row import RowBytes, encode_row, new_row
from models.wire import Stamp, encode_folded
from pipelines.encode import EncodedBatch
from pipelines.update import TRIES, UpdateCounts, by_user, update_rows
from tests.pipelines.small_log import assert_rows_equal, plain_rows, read_rows, recent_of
from tests.small import random_events, small_checkpoint

USERS = [f"u{n}" for n in range(7)]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "c")


@pytest.fixture
def rows(tmp_path: Path) -> SqliteRows:
    return SqliteRows(tmp_path / "rows.db")


def batch(checkpoint: Checkpoint, events: Sequence[Event], first_offset: int = 0, partition: int = 0) -> EncodedBatch:
    return EncodedBatch(
        epoch=1,
        partition=partition,
        user_ids=[event.user_id for event in events],
        recent=recent_of(checkpoint, events, range(first_offset, first_offset + len(events))),
        unknown_items=0,
        unknown_actions=0,
    )


def put_of(user_id: str, row: RowBytes, stamp: Stamp) -> RowPut:
    return RowPut(user_id=user_id, stamp=stamp, recent=row.recent, folded=row.folded)


class LosesRaces(SqliteRows):
    """Before each of the first `races` puts, another writer brings every row up to the batch given."""

    def race(self, checkpoint: Checkpoint, other: EncodedBatch, races: int) -> None:
        self._other, self._races, self._fold = other, races, checkpoint.fold()

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        if self._races:
            self._races -= 1
            update_rows(SqliteRows(self.path), self._fold, self._other)
        return super().put_rows(checkpoint_id, puts)


class Repaired(SqliteRows):
    """Before the next put, a repair is put."""

    repair: RowPut | None = None

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        if self.repair is not None:
            assert super().put_rows(checkpoint_id, [self.repair]) == [True]
            self.repair = None
        return super().put_rows(checkpoint_id, puts)


class RefusesAll(SqliteRows):
    """A store whose fence refuses everything."""

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        return [False] * len(puts)


def test_events_are_grouped_by_user_in_log_order(checkpoint: Checkpoint) -> None:
    mixed = batch(checkpoint, random_events(40))

    users = by_user(mixed)

    assert sorted(users.user_ids) == sorted(set(mixed.user_ids))
    for user_id, events in zip(users.user_ids, np.split(users.event_N, users.end_U[:-1]), strict=True):
        mine = [record for record, other in zip(mixed.recent, mixed.user_ids, strict=True) if other == user_id]
        assert events.tolist() == [record.tolist() for record in mine]
    assert len(users.event_N) == 40


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_the_plain_fold_however_the_log_is_cut(checkpoint: Checkpoint, tmp_path: Path, seed: int) -> None:
    events, rng, rows = random_events(300, seed=seed), np.random.default_rng(seed), SqliteRows(tmp_path / "rows.db")
    cuts = [0, *sorted(rng.integers(0, 300, 12).tolist()), 300]

    counts = [
        update_rows(rows, checkpoint.fold(), batch(checkpoint, events[start:stop], start))
        for start, stop in pairwise(cuts)
        if stop > start
    ]

    assert_rows_equal(read_rows(rows, checkpoint, USERS), plain_rows(checkpoint, events, partitions=1))
    assert sum(c.events_folded for c in counts) == 300
    assert sum(c.events_skipped + c.conflicts for c in counts) == 0


def test_a_batch_delivered_again_changes_and_writes_nothing(checkpoint: Checkpoint, rows: SqliteRows) -> None:
    given = batch(checkpoint, random_events(100))
    first = update_rows(rows, checkpoint.fold(), given)
    before = rows.get_rows(checkpoint.checkpoint_id, USERS)

    again = update_rows(rows, checkpoint.fold(), given)

    assert first.events_folded == 100
    assert first.bytes_written >= first.rows_written * 100
    assert again == UpdateCounts(events_skipped=100, cache_misses=len(USERS))
    assert rows.get_rows(checkpoint.checkpoint_id, USERS) == before


def test_an_overlapping_batch_adds_only_what_is_new(checkpoint: Checkpoint, rows: SqliteRows) -> None:
    events = random_events(100)
    update_rows(rows, checkpoint.fold(), batch(checkpoint, events[:70]))

    counts = update_rows(rows, checkpoint.fold(), batch(checkpoint, events[40:], 40))

    assert (counts.events_folded, counts.events_skipped) == (30, 30)
    assert_rows_equal(read_rows(rows, checkpoint, USERS), plain_rows(checkpoint, events, partitions=1))


def test_an_unchanged_folded_part_is_not_written_again(checkpoint: Checkpoint, rows: SqliteRows) -> None:
    events = [event for event in random_events(200) if event.user_id == "u0"]
    update_rows(rows, checkpoint.fold(), batch(checkpoint, events[:8]))
    (before,) = rows.get_rows(checkpoint.checkpoint_id, ["u0"])

    counts = update_rows(rows, checkpoint.fold(), batch(checkpoint, events[8:9], 8))

    (after,) = rows.get_rows(checkpoint.checkpoint_id, ["u0"])
    assert after.folded == before.folded
    assert counts.bytes_written == len(after.recent)


@pytest.mark.parametrize("ahead", [61, 80, 100])
def test_a_lost_race_is_redone_and_each_event_counted_once(checkpoint: Checkpoint, tmp_path: Path, ahead: int) -> None:
    events, rows, using = random_events(100, users=3), LosesRaces(tmp_path / "rows.db"), checkpoint.fold()
    update_rows(SqliteRows(rows.path), using, batch(checkpoint, events[:60]))
    rows.race(checkpoint, batch(checkpoint, events[60:ahead], 60), races=1)

    counts = update_rows(rows, using, batch(checkpoint, events[60:], 60))

    assert counts.events_folded + counts.events_skipped == 40
    assert_rows_equal(read_rows(rows, checkpoint, USERS), plain_rows(checkpoint, events, partitions=1))
    if ahead == 100:
        assert (counts.events_skipped, counts.rows_written) == (40, 0)
        assert counts.conflicts == len({event.user_id for event in events[60:]})


def test_a_row_repaired_in_between_is_read_again(checkpoint: Checkpoint, tmp_path: Path) -> None:
    events, rows = [e for e in random_events(300, users=3) if e.user_id == "u0"], Repaired(tmp_path / "rows.db")
    update_rows(SqliteRows(rows.path), checkpoint.fold(), batch(checkpoint, events[:5]))
    before = read_rows(rows, checkpoint, ["u0"])["u0"]
    repaired = Stamp(epoch=1, partition=0, offset=before.stamp.offset, revision=1)
    folded_stamp = replace(before.folded_stamp, revision=1)
    data = encode_folded(before.folded, folded_stamp)
    rows.repair = whole_put("u0", replace(before, stamp=repaired, folded_stamp=folded_stamp, folded_data=data))

    counts = update_rows(rows, checkpoint.fold(), batch(checkpoint, events[5:6], 5))

    after = read_rows(rows, checkpoint, ["u0"])["u0"]
    assert (counts.events_folded, counts.conflicts, counts.rows_written) == (1, 1, 1)
    assert (after.stamp.offset, after.stamp.revision, after.folded_stamp, after.count) == (5, 1, folded_stamp, 6)


def test_puts_that_are_refused_for_ever_are_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=f"was refused {TRIES} times"):
        update_rows(RefusesAll(tmp_path / "rows.db"), checkpoint.fold(), batch(checkpoint, random_events(1)))


def test_a_damaged_row_stops_the_update_and_is_left_alone(checkpoint: Checkpoint, rows: SqliteRows) -> None:
    stamp = Stamp(epoch=1, partition=0, offset=-1)
    sound = encode_row(new_row(checkpoint.spec, 1, 0))
    damaged = RowBytes(folded=sound.folded, recent=sound.recent[:-1] + bytes([sound.recent[-1] ^ 1]))
    (event,) = random_events(1)
    rows.put_rows(checkpoint.checkpoint_id, [put_of(event.user_id, damaged, stamp)])

    with pytest.raises(WireError, match=rf"user '{event.user_id}' cannot be used \(checksum"):
        update_rows(rows, checkpoint.fold(), batch(checkpoint, [event]))

    assert rows.get_rows(checkpoint.checkpoint_id, [event.user_id]) == [damaged]


def test_a_row_of_another_checkpoint_keeps_its_kind_of_error(
    checkpoint: Checkpoint, rows: SqliteRows, tmp_path: Path
) -> None:
    other = small_checkpoint(tmp_path / "other", seed=1)
    foreign = encode_row(new_row(other.spec, 1, 0))
    (event,) = random_events(1)
    rows.put_rows(checkpoint.checkpoint_id, [put_of(event.user_id, foreign, Stamp(epoch=1, partition=0, offset=-1))])

    with pytest.raises(ForeignRowError, match=event.user_id):
        update_rows(rows, checkpoint.fold(), batch(checkpoint, [event]))


def test_a_user_that_moved_to_another_partition_stops_the_update(checkpoint: Checkpoint, rows: SqliteRows) -> None:
    update_rows(rows, checkpoint.fold(), batch(checkpoint, random_events(20)))

    with pytest.raises(InputError, match=r"moved from partition 0 to 1 within epoch 1"):
        update_rows(rows, checkpoint.fold(), batch(checkpoint, random_events(20), partition=1))
