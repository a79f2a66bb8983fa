from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from apache_beam.utils.timestamp import MAX_TIMESTAMP, MIN_TIMESTAMP
from deltalake import DeltaTable

from feature_repo.handle import StoreHandle
from models.errors import InputError
from models.event import Records
from pipelines.delta_source import READ_AHEAD_BATCHES, DeltaReader, DeltaSource, open_log
from pipelines.records import Ledger, Slice
from pipelines.worker import forget_opened, stop_requested
from tests.pipelines.small_log import append, append_at, new_log, set_properties

BATCH_SIZE = 10


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget_opened()


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return new_log(tmp_path / "log")


def source(log: Path, *parts: Slice, epoch: int = 1) -> DeltaSource:
    ledger = Ledger(store=StoreHandle(state=log.parent), checkpoint_id="ab" * 16, epoch=epoch)
    return DeltaSource(path=log, slices=parts, ledger=ledger, batch_size=BATCH_SIZE)


def reader(log: Path, after: int = -1, until: int | None = None, epoch: int = 1) -> DeltaReader:
    part = Slice(partition=0, after_offset=after, until_offset=until)
    return source(log, part, epoch=epoch).create_reader(None, None)


def drain(it: DeltaReader) -> list[Records]:
    found = [it.get_current()] if it.start() else []
    while it.advance():
        found.append(it.get_current())
    return found


def offsets(batches: list[Records]) -> list[int]:
    return [offset for batch in batches for offset in batch.offset_N.tolist()]


def values(first: int, count: int) -> list[bytes]:
    return [b"v%d" % n for n in range(first, first + count)]


def test_an_opened_log_knows_its_epoch_and_the_end_of_every_partition(log: Path) -> None:
    append(log, 1, values(0, 5), 0)
    append(log, 1, values(5, 2), 5)

    opened = open_log(log)

    assert (opened.epoch, opened.ends) == (1, {0: -1, 1: 6})


def test_what_is_no_log_is_refused(tmp_path: Path, log: Path) -> None:
    with pytest.raises(InputError, match=r"no event log at .*missing; make one by vql ingest"):
        open_log(tmp_path / "missing")
    set_properties(DeltaTable(log), {"vql.partitions": "many"})
    with pytest.raises(InputError, match="many"):
        open_log(log)


def test_records_come_in_offset_order_in_batches_whatever_the_files(log: Path) -> None:
    append(log, 0, values(40, 65), 40)
    append(log, 0, values(0, 3), 0)
    append(log, 0, values(3, 37), 3)
    append(log, 1, values(0, 9), 0)
    DeltaTable(log).optimize.compact()
    append(log, 0, values(105, 20), 105)

    batches = drain(reader(log))

    assert offsets(batches) == list(range(125))
    assert [value for batch in batches for value in batch.values] == values(0, 125)
    assert max(len(batch) for batch in batches) == BATCH_SIZE
    assert {(batch.epoch, batch.partition) for batch in batches} == {(1, 0)}


def test_memory_is_bounded_by_the_read_ahead_not_by_the_file(log: Path) -> None:
    append(log, 0, values(0, 500), 0)

    it = reader(log)
    it.start()

    assert len(it._ahead) == READ_AHEAD_BATCHES - 1


def test_a_bounded_reader_ends_at_its_end_although_the_log_goes_on(log: Path) -> None:
    append(log, 0, values(0, 30), 0)

    it = reader(log, after=4, until=17)

    assert it.get_watermark() == MIN_TIMESTAMP
    assert offsets(drain(it)) == list(range(5, 18))
    assert it.get_watermark() == MAX_TIMESTAMP


def test_an_empty_slice_ends_at_once(log: Path) -> None:
    it = reader(log, until=-1)

    assert not it.start()
    assert it.get_watermark() == MAX_TIMESTAMP


def test_an_endless_reader_waits_and_sees_new_commits(log: Path) -> None:
    it = reader(log)
    assert not it.start()
    append(log, 0, values(0, 12), 0)

    assert offsets(drain(it)) == list(range(12))
    append(log, 0, values(12, 1), 12)
    assert it.advance()
    assert it.get_current().offset_N.tolist() == [12]
    assert it.get_watermark() == MIN_TIMESTAMP


def test_a_reader_made_from_a_mark_goes_on_after_it(log: Path) -> None:
    append(log, 0, values(0, 35), 0)
    (made,) = source(log, Slice(partition=0, after_offset=-1, until_offset=None)).split(20)
    it = made.create_reader(None, None)
    first = [it.start() and it.get_current(), it.advance() and it.get_current()]
    mark = it.get_checkpoint_mark()

    rest = drain(made.create_reader(None, mark))

    assert mark.offset == 19
    assert offsets(first) + offsets(rest) == list(range(35))


def test_a_source_splits_into_its_partitions(log: Path) -> None:
    parts = [Slice(partition=p, after_offset=p, until_offset=None) for p in range(3)]

    assert [made.slices for made in source(log, *parts).split(1)] == [(part,) for part in parts]


@pytest.mark.parametrize("after", [-1, 19, 24])
def test_a_gap_stops_the_reader_and_is_named(log: Path, after: int) -> None:
    append(log, 0, values(0, 25), 0)
    append(log, 0, values(28, 5), 28)

    with pytest.raises(InputError, match=r"partition 0: offsets from 25 on are missing \(3 of"):
        drain(reader(log, after=after))


def test_a_gap_longer_than_the_read_ahead_is_no_quiet_end(log: Path) -> None:
    append(log, 0, values(0, 1), 0)
    append(log, 0, values(900, 5), 900)

    with pytest.raises(InputError, match="offsets from 1 on are missing"):
        drain(reader(log))


def test_a_missing_beginning_is_a_gap(log: Path) -> None:
    append(log, 0, values(5, 5), 5)

    with pytest.raises(InputError, match="offsets from 0 on are missing"):
        drain(reader(log))


def test_an_offset_ingested_twice_stops_the_reader(log: Path) -> None:
    append(log, 0, values(0, 9), 0)
    append(log, 0, values(7, 4), 7)

    with pytest.raises(InputError, match="offset 7 is there twice"):
        drain(reader(log))


def test_a_file_removed_under_the_reader_is_an_error_not_an_end(log: Path) -> None:
    append(log, 0, values(0, 9), 0)
    it = reader(log)
    for file in log.rglob("*.parquet"):
        file.unlink()

    with pytest.raises(InputError, match="partition 0, offsets 0 to 8"):
        it.start()


def test_a_tombstone_keeps_its_key_and_has_no_value(log: Path) -> None:
    append(log, 0, [None, b"x"], 0)

    (batch,) = drain(reader(log))
    assert (batch.values, batch.keys[0]) == ([None, b"x"], b"erased")


SPARSE = [3, 4, 57, 58, 61, 500, 40_000_000, 40_000_049, 40_000_051, 90_000_000]


@pytest.fixture
def sparse_log(log: Path) -> Path:
    """A topic's copy: holes within a window, at its edges, and of many windows."""
    set_properties(DeltaTable(log), {"vql.dense": "false"})
    append_at(log, 0, {n: b"v%d" % n for n in SPARSE[::2]})
    append_at(log, 0, {n: b"v%d" % n for n in SPARSE[1::2]})
    return log


@pytest.mark.parametrize("after", [-1, 3, 4, 60, 499, 500, 39_999_999, 90_000_000])
def test_a_topics_copy_is_read_whole_across_its_holes(sparse_log: Path, after: int) -> None:
    it = reader(sparse_log, after=after)
    batches = drain(it)

    assert offsets(batches) == [n for n in SPARSE if n > after]
    assert [value for batch in batches for value in batch.values] == [b"v%d" % n for n in SPARSE if n > after]
    append_at(sparse_log, 0, {91_000_000: b"new"})
    assert it.advance()
    assert it.get_current().offset_N.tolist() == [91_000_000]


@pytest.mark.parametrize("until", [4, 5, 62, 499, 39_000_000, 90_000_000])
def test_a_slice_of_a_topics_copy_ends_also_in_a_hole(sparse_log: Path, until: int) -> None:
    it = reader(sparse_log, until=until)

    assert offsets(drain(it)) == [n for n in SPARSE if n <= until]
    assert it.get_watermark() == MAX_TIMESTAMP
    assert it.get_checkpoint_mark().offset == until


def test_memory_is_bounded_in_a_topics_copy_as_well(sparse_log: Path) -> None:
    append(sparse_log, 0, values(0, 500), 100_000_000)

    it = reader(sparse_log, after=90_000_000)
    it.start()

    assert len(it._ahead) <= READ_AHEAD_BATCHES - 1
    assert it.get_current().offset_N[0] == 100_000_000


def test_an_offset_that_is_twice_in_a_topics_copy_stops_the_reader(sparse_log: Path) -> None:
    append_at(sparse_log, 0, {500: b"again"})

    with pytest.raises(InputError, match="offset 500 is there twice"):
        drain(reader(sparse_log))


def test_a_compaction_over_two_epochs_does_not_move_the_end(log: Path) -> None:
    append(log, 0, values(0, 30), 0)
    append(log, 0, values(0, 4), 0, epoch=2)
    set_properties(DeltaTable(log), {"vql.epoch": "2"})
    DeltaTable(log).optimize.compact()

    assert open_log(log).ends == {0: 3, 1: -1}
    assert offsets(drain(reader(log, epoch=2))) == [0, 1, 2, 3]


def test_records_of_an_older_epoch_are_not_read(log: Path) -> None:
    append(log, 0, values(0, 30), 0)
    append(log, 0, values(0, 4), 0, epoch=2)
    set_properties(DeltaTable(log), {"vql.epoch": "2"})

    assert open_log(log).ends == {0: 3, 1: -1}
    assert offsets(drain(reader(log, epoch=2))) == [0, 1, 2, 3]


def test_an_epoch_that_rises_under_the_reader_stops_it(log: Path) -> None:
    it = reader(log)
    it.start()
    set_properties(DeltaTable(log), {"vql.epoch": "2"})

    with pytest.raises(InputError, match="is now 2, not 1"):
        it.advance()


def test_a_requested_stop_ends_the_reader_where_it_is(log: Path) -> None:
    append(log, 0, values(0, 30), 0)
    it = reader(log)
    it.start()
    stop_requested.set()

    assert not it.advance()
    assert it.get_watermark() == MAX_TIMESTAMP
    assert it.get_checkpoint_mark().offset == BATCH_SIZE - 1


def test_offsets_are_integers_that_rows_can_carry(log: Path) -> None:
    append(log, 0, values(0, 3), 0)

    assert drain(reader(log))[0].offset_N.dtype == np.int64
