"""A batch's tensors made while its rows are still coming: by a thread beside the one that receives them, and by both
once all are there.

Checking and folding leave the interpreter free (they are compiled), so the two run at the same time. Where the thread
is busy with other calls' rows, the caller makes its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from functools import cached_property

from models.dense_caches import DenseBatch
from models.row import RowBytes
from models.row_places import StoredRows


class Filling:
    """Takes the parts of one read (`feature_repo.store.TakeRows`) and has them filled in. One caller's, not shared."""

    def __init__(self, users: int, make: Callable[[int], DenseBatch], threads: Executor) -> None:
        self._users, self._make, self._threads = users, make, threads
        self._parts: dict[int, tuple[Future[None] | None, Sequence[RowBytes | None]]] = {}

    @cached_property
    def batch(self) -> DenseBatch:
        """What is filled in."""
        return self._make(self._users)

    def take(self, first: int, rows: Sequence[RowBytes | None]) -> None:
        """Have these rows filled in soon; the last part by the caller, for whom there is nothing left to receive.

        What came from here on before, in a try that failed, is done with first. Without rows, only make the batch.
        """
        for filled, _ in [self._parts.pop(begun) for begun in list(self._parts) if begun >= first]:
            if filled is not None and not filled.cancel():
                wait([filled])
        batch, filled = self.batch, None
        if not rows:
            return
        if first + len(rows) != self._users:
            # The threads may be shut down: the reader was closed while this read was under way.
            with suppress(RuntimeError):
                filled = self._threads.submit(batch.fill, first, rows)
        self._parts[first] = filled, rows
        if filled is None:
            batch.fill(first, rows)

    def finish(self) -> Sequence[RowBytes | None]:
        """All rows, filled in when this returns; those that no thread has begun by now, by the caller."""
        for first, (filled, rows) in reversed(self._parts.items()):
            if filled is None:
                continue
            if filled.cancel():
                self.batch.fill(first, rows)
            else:
                filled.result()
        return StoredRows.joined([self._parts[first][1] for first in sorted(self._parts)])
