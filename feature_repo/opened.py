"""A checkpoint that is in use: its item table as of a few seconds ago, since `encode-items` may append meanwhile.

The stream looks where it stands. A ranker must not wait while a table is read, so it takes the table as it was loaded
last (`loaded`) and has another thread look (`due`, `look`).
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.files import FileVersion, file_version
from models.row import Fold

LOOK_EVERY_S = 5.0

_log = logging.getLogger(__name__)


class Opened:
    """A checkpoint in memory, with its item table. Safe to share between threads."""

    def __init__(self, checkpoint: Checkpoint, clock: Callable[[], float] = time.monotonic) -> None:
        self.checkpoint = checkpoint
        self._clock = clock
        self._turn = threading.Lock()
        self.reload()

    @property
    def fold(self) -> Fold:
        """The table, after a look whether it has grown if one is due."""
        self.look()
        return self._fold

    @property
    def loaded(self) -> Fold:
        """The table as it was loaded last."""
        return self._fold

    @property
    def due(self) -> bool:
        """Whether the last look is LOOK_EVERY_S ago."""
        return self._clock() >= self._look_at_s

    def look(self) -> None:
        """Load the table if a look is due and it has changed; one that cannot be read is logged, and not used."""
        if not self.due or not self._turn.acquire(blocking=False):
            return
        try:
            # Claimed before the load: who asks meanwhile need not wait for it.
            self._look_at_s = self._clock() + LOOK_EVERY_S
            if self._version() != self._seen:
                self._load()
        except CheckpointError as error:
            _log.error("the item table has changed and cannot be used: %s", error)
        finally:
            self._turn.release()

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
        _log.info("item table loaded", extra={"items": len(self._fold.table)})

    def _version(self) -> FileVersion | None:
        return file_version(self.checkpoint.items_path / "items.json")
