"""A reader that goes on while the online store is away: its users are then scored without history, and flagged.

A store that did not answer is left alone for a moment, so that requests do not queue up behind its time-outs. One
that is lost (emptied, refused) is not gone on without: that error reaches the caller.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import structlog

from feature_repo.reader import Read
from jobs.scoring import CacheReader
from models.attention import CacheBatch
from models.cache import CacheSpec
from models.errors import UnavailableError

LATE = "late"
PAUSE_S = 1.0


class StoreGate:
    """Whether the store is to be asked now. One for all checkpoints, since they share the store; for any thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._open_at_s: float | None = None

    @property
    def shut(self) -> bool:
        open_at_s = self._open_at_s
        return open_at_s is not None and self._clock() < open_at_s

    def failed(self, error: UnavailableError) -> None:
        if self._open_at_s is None:
            structlog.get_logger().warning("users are scored without history", error=str(error))
        self._open_at_s = self._clock() + PAUSE_S

    def answered(self) -> None:
        if self._open_at_s is not None:
            self._open_at_s = None
            structlog.get_logger().info("the online store answers again")


class PatientReader:
    """`reader`, with users of a store that does not answer as missing for the reason LATE."""

    def __init__(self, reader: CacheReader, spec: CacheSpec, gate: StoreGate) -> None:
        self._reader, self._spec, self._gate = reader, spec, gate

    def read(self, user_ids: Sequence[str]) -> Read:
        """Raises StoreError for a store that waiting does not heal."""
        if self._gate.shut:
            return self._without(user_ids)
        try:
            read = self._reader.read(user_ids)
        except UnavailableError as error:
            self._gate.failed(error)
            return self._without(user_ids)
        self._gate.answered()
        return read

    def _without(self, user_ids: Sequence[str]) -> Read:
        return Read(
            caches=CacheBatch.of(self._spec, [None] * len(user_ids)),
            missing=dict.fromkeys(user_ids, LATE),
            unknown_items=0,
        )
