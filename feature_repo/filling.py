"""A batch's tensors made while its rows are still coming: by a thread beside the one that receives them, and by both
once all are there.

Checking and folding leave the interpreter free (they are compiled), so the two run at the same time. Where the thread
is busy with other calls' rows, the caller makes its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress

from models.dense_caches import DenseBatch
from models.row import RowBytes


class Filling:
    """Takes the parts of one read (`feature_repo.store.TakeRows`) and has them filled in. One caller's, not shared."""

    def __init__(self, batch: DenseBatch, threads: Executor) -> None:
        self._batch, self._threads = batch, threads
        self._parts: dict[int, tuple[Future[None] | None, Sequence[RowBytes | None]]] = {}

    def take(self, first: int, rows: Sequence[RowBytes | None]) -> None:
        """Have these rows filled in soon; the last part by the caller, for whom there is nothing left to receive.

        What came from here on before, in a try that failed, is done with first.
        """
        for filled, _ in [self._parts.pop(begun) for begun in list(self._parts) if begun >= first]:
            if filled is not None and not filled.cancel():
                wait([filled])
        filled = None
        if first + len(rows) != len(self._batch.place_B):
            # The threads may be shut down: the reader was closed while this read was under way.
            with suppress(RuntimeError):
                filled = self._threads.submit(self._batch.fill, first, rows)
        self._parts[first] = filled, rows
        if filled is None:
            self._batch.fill(first, rows)

    def finish(self) -> dict[int, Sequence[RowBytes | None]]:
        """All parts, by the place of their first row, filled in; those that no thread has begun, by the caller."""
        for first, (filled, rows) in reversed(self._parts.items()):
            if filled is None:
                continue
            if filled.cancel():
                self._batch.fill(first, rows)
            else:
                filled.result()
        return {first: rows for first, (_, rows) in self._parts.items()}
