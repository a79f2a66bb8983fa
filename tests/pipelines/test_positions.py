from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.store import Backfill
from models.errors import InputError, StoreError
from pipelines.delta_source import Log
from pipelines.positions import Shard, slices, start_positions
from pipelines.records import Slice

LOG = Log(path=Path("log"), log_id="id", epoch=2, ends={0: 100, 1: 50, 2: -1})


def backfill(cut: dict[int, int], epoch: int = 2) -> Backfill:
    return Backfill(epoch=epoch, cut=cut, users=1, events=1, log="log")


def test_a_stream_resumes_at_the_committed_positions() -> None:
    assert start_positions(LOG, {0: (2, 7), 1: (2, 8), 2: (2, -1)}, None, "resume") == {0: 7, 1: 8, 2: -1}


def test_the_first_stream_starts_at_the_cut_and_at_the_beginning_of_what_the_backfill_did_not_meet() -> None:
    assert start_positions(LOG, {}, backfill({0: 90, 1: 50}), "resume") == {0: 90, 1: 50, 2: -1}


def test_the_later_of_cut_and_committed_position_counts() -> None:
    assert start_positions(LOG, {0: (2, 95), 1: (2, 3)}, backfill({0: 90, 1: 50}), "resume") == {0: 95, 1: 50, 2: -1}


def test_without_a_backfill_nothing_starts_but_by_explicit_choice() -> None:
    with pytest.raises(StoreError, match=r"never backfilled; run vql backfill, or start with --from earliest"):
        start_positions(LOG, {0: (2, 7)}, None, "resume")

    assert start_positions(LOG, {0: (2, 7)}, None, "earliest") == {0: -1, 1: -1, 2: -1}


@pytest.mark.parametrize("start", ["resume", "earliest"])
def test_another_epoch_is_refused(start) -> None:
    with pytest.raises(StoreError, match=r"epoch 1.*vql backfill"):
        start_positions(LOG, {}, backfill({0: 1}, epoch=1), start)
    with pytest.raises(StoreError, match="epoch 3"):
        start_positions(LOG, {0: (3, 1)}, backfill({0: 1, 1: 1}), start)


def test_a_backfill_of_the_new_epoch_supersedes_old_positions() -> None:
    assert start_positions(LOG, {0: (1, 5000)}, backfill({0: 9}), "resume") == {0: 9, 1: -1, 2: -1}


def test_a_backfill_of_a_new_epoch_with_fewer_partitions_supersedes_the_positions_of_all() -> None:
    assert start_positions(LOG, {0: (1, 5), 7: (1, 5000)}, backfill({0: 9}), "resume") == {0: 9, 1: -1, 2: -1}

    with pytest.raises(StoreError, match="hold partition 7 of epoch 2"):
        start_positions(LOG, {7: (2, 5000)}, backfill({0: 9}), "resume")


def test_a_log_shorter_than_the_rows_is_refused() -> None:
    with pytest.raises(StoreError, match="up to offset 101, but log ends at 100"):
        start_positions(LOG, {}, backfill({0: 101}), "resume")


def test_slices_end_where_the_log_ends_or_never() -> None:
    positions = {0: 7, 1: 8, 2: -1}

    assert slices(LOG, positions, None, "end")[2] == Slice(partition=2, after_offset=-1, until_offset=-1)
    assert slices(LOG, positions, (1,), "forever") == (Slice(partition=1, after_offset=8, until_offset=None),)


@pytest.mark.parametrize("partitions", [(0, 3), ()])
def test_partitions_that_the_log_does_not_have_are_refused(partitions) -> None:
    with pytest.raises(InputError, match="0 to 2"):
        slices(LOG, {0: 0, 1: 0, 2: 0}, partitions, "end")


@pytest.mark.parametrize("count", [1, 2, 3])
def test_shards_have_every_partition_once(count: int) -> None:
    positions = dict.fromkeys(LOG.ends, -1)
    shares = [slices(LOG, positions, Shard(index=index, count=count), "end") for index in range(count)]
    assert sorted(part.partition for share in shares for part in share) == [0, 1, 2]


def test_a_shard_for_which_no_partition_is_left_is_refused() -> None:
    with pytest.raises(InputError, match="shard 3/4 has no partition of log, which has 3; run at most 3 shards"):
        slices(LOG, dict.fromkeys(LOG.ends, -1), Shard(index=3, count=4), "end")
