"""A batch that is filled by a thread, by its caller, or by both, is the one that is made at once."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from feature_repo.filling import Filling
from models.attention import CacheBatch
from models.checkpoint import Checkpoint
from models.dense_caches import DenseBatch, dense_caches
from models.row import Fold, RowBytes, encode_row
from models.turns import next_row
from tests.feature_repo.rows import small_rows

CPU = torch.device("cpu")


@pytest.fixture
def rows(checkpoint: Checkpoint, fold: Fold) -> list[RowBytes | None]:
    return [None, *(encode_row(row) for row in small_rows(checkpoint, fold, 400).values()), None]


def assert_as_at_once(batch: DenseBatch, rows: list[RowBytes | None], fold: Fold) -> None:
    expected = dense_caches(rows, fold, CPU).caches
    for name in CacheBatch.__slots__:
        assert torch.equal(getattr(batch.caches().caches, name), getattr(expected, name)), name


@pytest.mark.parametrize("state", ["free", "busy", "shut down"])
def test_parts_are_filled_in_whatever_the_thread_is_at(rows, fold: Fold, state: str):
    batch, free = DenseBatch(len(rows), fold, CPU), threading.Event()
    with ThreadPoolExecutor(1) as threads:
        if state == "busy":
            threads.submit(free.wait, 30)
        if state == "shut down":
            threads.shutdown()
        filling = Filling(len(rows), lambda _: batch, threads)
        for first in range(0, len(rows), 2):
            filling.take(first, rows[first : first + 2])
        filling.finish()
        assert_as_at_once(batch, rows, fold)
        free.set()


def test_a_part_that_comes_again_counts_as_it_came_last(rows, fold: Fold):
    batch = DenseBatch(len(rows), fold, CPU)
    with ThreadPoolExecutor(2) as threads:
        filling = Filling(len(rows), lambda _: batch, threads)
        filling.take(0, [rows[1]] * (len(rows) - 1))
        filling.take(0, rows[:-1])
        filling.take(len(rows) - 1, rows[-1:])
        filling.finish()
    assert_as_at_once(batch, rows, fold)


def test_what_a_failed_try_left_under_way_is_done_before_it_begins_again(rows, fold: Fold):
    free, order = threading.Event(), []

    class SlowBatch(DenseBatch):
        def work(self):
            if "begun" not in order:
                order.append("begun")
                free.wait(30)
            super().work()

        def offer(self, first, rows):
            super().offer(first, rows)
            order.append(rows[0])

    batch = SlowBatch(len(rows), fold, CPU)
    with ThreadPoolExecutor(1) as pool:
        filling = Filling(len(rows), lambda _: batch, pool)
        filling.take(0, rows[1:2])
        while "begun" not in order:
            pass
        threading.Timer(0.2, free.set).start()
        filling.take(0, rows)
        assert free.is_set()
        filling.finish()
    assert_as_at_once(batch, rows, fold)


def test_rows_beyond_the_batch_are_refused_before_a_kernel_writes_there(rows, fold: Fold):
    with ThreadPoolExecutor(1) as threads:
        filling = Filling(len(rows), lambda users: DenseBatch(users, fold, CPU), threads)
        with pytest.raises(AssertionError, match="rows from"):
            filling.take(len(rows) - 1, rows)


def test_what_goes_wrong_in_a_thread_is_the_callers_to_know(rows, fold: Fold):
    class BadBatch(DenseBatch):
        def work(self):
            if threading.current_thread() is not threading.main_thread():
                next_row(self._turns)
                begun.set()
                raise MemoryError("of this thread")

    begun = threading.Event()
    with ThreadPoolExecutor(1) as threads:
        filling = Filling(len(rows), lambda users: BadBatch(users, fold, CPU), threads)
        filling.take(0, rows[:1])
        assert begun.wait(30)
        with pytest.raises(MemoryError, match="of this thread"):
            filling.finish()
