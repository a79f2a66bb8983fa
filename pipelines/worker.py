"""What a worker process opens once and shares among its steps: the store, rows of it, and the checkpoint.

Nothing that is kept here matters.

`run` forgets it first, so that a second stream in one process sees the item table and the store as they are now.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import structlog

from feature_repo.store import RowStore
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import CheckpointError, MismatchError
from models.row import Fold
from pipelines.held_letters import held_letters
from pipelines.row_cache import RowCache

LOOK_EVERY_S = 5.0

# Set by a signal: readers in this process then report the end of their partition, as if the log ended here.
stop_requested = threading.Event()


class RowsHandle(Protocol):
    """What travels to the workers in place of an open store: picklable, hashable, equal when the same store."""

    def open(self) -> RowStore: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class CheckpointRef:
    """A checkpoint by path and id, so that a worker which finds another one there stops."""

    path: Path
    checkpoint_id: str


class Opened:
    """A checkpoint in memory, with its item table as of a few seconds ago: `encode-items` may append meanwhile.

    Safe to share between threads.
    """

    def __init__(self, checkpoint: Checkpoint, clock: Callable[[], float] = time.monotonic) -> None:
        self.checkpoint = checkpoint
        self._clock = clock
        self._turn = threading.Lock()
        self.reload()

    @property
    def fold(self) -> Fold:
        """Looks whether the table has grown every LOOK_EVERY_S; one that cannot be read is logged, and not used."""
        if self._clock() >= self._look_at_s and self._turn.acquire(blocking=False):
            try:
                if self._version() != self._seen:
                    self._load()
                self._look_at_s = self._clock() + LOOK_EVERY_S
            except CheckpointError as error:
                self._look_at_s = self._clock() + LOOK_EVERY_S
                structlog.get_logger().error("the item table has changed and cannot be used", error=str(error))
            finally:
                self._turn.release()
        return self._fold

    def reload(self) -> Fold:
        """The table as it is now. Raises CheckpointError when it cannot be used."""
        with self._turn:
            self._load()
            self._look_at_s = self._clock() + LOOK_EVERY_S
            return self._fold

    def _load(self) -> None:
        # Looked at before it is read: what is appended in between is found the next time.
        self._seen = self._version()
        self._fold = self.checkpoint.fold()
        structlog.get_logger().info("item table loaded", items=len(self._fold.table))

    def _version(self) -> tuple[int, int, int] | None:
        try:
            found = (self.checkpoint.items_path / "items.json").stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_ino, found.st_size


@lru_cache(maxsize=1)
def opened_rows(handle: RowsHandle) -> RowStore:
    """The store, opened once per process."""
    return handle.open()


@lru_cache(maxsize=1)
def opened_checkpoint(ref: CheckpointRef) -> Opened:
    """The checkpoint, opened once per process. Raises CheckpointError, and MismatchError when it was replaced."""
    log_to_standard_error()
    checkpoint = open_checkpoint(ref.path)
    if checkpoint.checkpoint_id != ref.checkpoint_id:
        raise MismatchError(f"{ref.path} is checkpoint {checkpoint.checkpoint_id}, not {ref.checkpoint_id}; restart")
    return Opened(checkpoint)


@lru_cache(maxsize=1)
def opened_row_cache(handle: RowsHandle, checkpoint_id: str, bytes_max: int) -> RowCache:
    """The rows of this store and checkpoint that this process keeps in memory."""
    return RowCache(bytes_max)


def log_to_standard_error() -> None:
    """Where structlog's lines go in a process that nobody configured, as are the workers of Beam's pool.

    The pool never reads its workers' standard output: the first 64 KiB written there would be a worker's last.
    """
    if not structlog.is_configured():
        structlog.configure(logger_factory=lambda *_: structlog.PrintLogger(sys.stderr))


def forget_opened() -> None:
    """Open the store and the checkpoint anew at their next use in this process."""
    opened_rows.cache_clear()
    opened_checkpoint.cache_clear()
    opened_row_cache.cache_clear()
    held_letters.cache_clear()
    stop_requested.clear()
