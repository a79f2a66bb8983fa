"""A batch's tensors made while its rows are still coming: by a thread beside the one that receives them, and by both
once all are there.

Checking and folding leave the interpreter free (they are compiled), so the two run at the same time, and take one row
after the other in turns: none waits for a part to be full, and both end together. Where the thread is busy with other
calls' rows, the caller makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from functools import cached_property

from models.dense_caches import DenseBatch
from models.row import RowBytes


class Filling:
    """Takes the parts of one read (`feature_repo.store.TakeRows`) and has them filled in. One caller's, not shared."""

    def __init__(self, users: int, make: Callable[[int], DenseBatch], threads: Executor) -> None:
        self._users, self._make, self._threads = users, make, threads
        self._taken = 0
        self._workers: list[Future[None]] = []

    @cached_property
    def batch(self) -> DenseBatch:
        """What is filled in."""
        return self._make(self._users)

    def take(self, first: int, rows: Sequence[RowBytes | None]) -> None:
        """Have these rows filled in soon; the last ones by the caller too, who has nothing left to receive.

        What came from here on before, in a try that failed, is done with first. Without rows, only make the batch.
        """
        if first < self._taken:
            self._end()
        batch, self._taken = self.batch, first + len(rows)
        if not rows:
            return
        behind = batch.is_behind
        batch.offer(first, rows)
        # A thread if none is at work, and another if those that are do not keep up.
        if self._taken < self._users and all(
            worker.done() or (behind and worker.running()) for worker in self._workers
        ):
            # The threads may be shut down: the reader was closed while this read was under way.
            with suppress(RuntimeError):
                self._workers.append(self._threads.submit(batch.work))

    def finish(self) -> Sequence[RowBytes | None]:
        """All rows, filled in when this returns."""
        self.batch.work()
        # The other thread's last row is what is waited for, and not that thread's own end, which takes longer.
        if not self.batch.is_done():
            self._end()
            assert self.batch.is_done(), "a row that was taken is not done"
        for worker in self._workers:
            worker.cancel()
        return self.batch.rows

    def _end(self) -> None:
        """No other thread is at work when this returns. Raises what went wrong in one."""
        begun = [worker for worker in self._workers if not worker.cancel()]
        self._workers.clear()
        wait(begun)
        for worker in begun:
            worker.result()
