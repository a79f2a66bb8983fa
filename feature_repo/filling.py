"""A batch's tensors made while its rows are still coming: by a thread beside the one that receives them, and by both
once all are there.

Checking and folding leave the interpreter free (they are compiled), so the two run at the same time. Where the thread
is busy with other calls' rows, the caller makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait

from models.dense_caches import DenseBatch
from models.row import RowBytes


class Filling:
    """Takes the parts of one read (`feature_repo.store.TakeRows`) and has them filled in. One caller's, not shared."""

    def __init__(self, batch: DenseBatch, threads: Executor) -> None:
        self._batch, self._threads = batch, threads
        self._parts: dict[int, tuple[Future[None], Sequence[RowBytes | None]]] = {}

    def take(self, first: int, rows: Sequence[RowBytes | None]) -> None:
        """Have these rows filled in soon; the last part by the caller, for whom there is nothing left to receive.

        A part that came before, in a try that failed, is done with first.
        """
        if first in self._parts:
            wait([self._parts[first][0]])
        if first + len(rows) == len(self._batch.place_B):
            self._batch.fill(first, rows)
            return
        try:
            self._parts[first] = self._threads.submit(self._batch.fill, first, rows), rows
        except RuntimeError:  # the threads were shut down: the reader was closed while this read was under way
            self._batch.fill(first, rows)

    def finish(self) -> None:
        """All parts are filled in when this returns; those that no thread has begun by now, by the caller."""
        for first, (filled, rows) in reversed(self._parts.items()):
            if filled.cancel():
                self._batch.fill(first, rows)
            else:
                filled.result()
