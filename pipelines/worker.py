"""What a worker process opens once and shares among its steps: the store, rows of it, and the checkpoint.

Nothing that is kept here matters.

`run` forgets it first, so that a second stream in one process sees the item table and the store as they are now.
"""

from __future__ import annotations

import sys
import threading
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Protocol

import structlog

from feature_repo.forgotten import ForgottenRef, WatchedForgotten
from feature_repo.opened import Opened
from feature_repo.store import RowStore
from models.checkpoint import open_checkpoint
from models.errors import MismatchError
from pipelines.held_letters import held_letters
from pipelines.row_cache import RowCache

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


@lru_cache(maxsize=1)
def opened_forgotten(ref: ForgottenRef) -> WatchedForgotten:
    """The list of forgotten users, looked at every few seconds."""
    return WatchedForgotten(ref)


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
    opened_forgotten.cache_clear()
    held_letters.cache_clear()
    stop_requested.clear()
