"""Every error this product raises on purpose, and what its catcher does.

VqlError                      the command line prints one line and exits with `exit_code`
|-- InputError         (2)    bad arguments or data from outside: fix the named value and run again
|-- EventError         (2)    one bad event: the stream sends it to the dead letters and goes on
|-- CheckpointError    (3)    not a checkpoint, damaged, or of an unknown version: stop
|   |-- MismatchError  (3)    two checkpoints meet (caches, rows, tables): refuse, never mix
|   `-- TableBehindError (3)  a row holds an item that was encoded since the table was loaded: load it again
|-- WireError          (4)    a row's bytes are damaged: a ranker masks the user, a writer stops
|   `-- ForeignRowError (3)   the row was made with another checkpoint: as above
|-- StoreError         (5)    the online store is lost, damaged or was never backfilled: waiting does not heal it
|   `-- UnavailableError (5)  the online store does not answer now: trying again may help
|-- MachineError     (6)    Java, jars, the disk, a job service: the message says what to install, free or start
`-- GateError        (8)    a release was judged and refused: what is live stays; the message has the figures
"""

from __future__ import annotations


class VqlError(Exception):
    """The root: a message that names the value and the remedy, and the exit code of the command line."""

    exit_code = 1


class InputError(VqlError):
    """Something handed in from outside (a file, a column, an option) cannot be used."""

    exit_code = 2


class EventError(VqlError):
    """One event breaks the contract; `reason` is its dead-letter code."""

    exit_code = 2

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


class CheckpointError(VqlError):
    """A directory is no checkpoint, is damaged, or has a format this version does not know."""

    exit_code = 3


class MismatchError(CheckpointError):
    """Two things made with different checkpoints were about to be combined."""


class TableBehindError(CheckpointError):
    """A row holds an item beyond this item table: the table has grown since it was loaded."""


class WireError(VqlError):
    """Row bytes that fail their checks; nothing of them may be used."""

    exit_code = 4


class ForeignRowError(WireError):
    """A sound row, but of another checkpoint than the reader's."""

    exit_code = 3


class StoreError(VqlError):
    """The online store failed, is lost, or holds no backfill for this checkpoint."""

    exit_code = 5


class UnavailableError(StoreError):
    """The online store does not answer now; what was asked may or may not have been done, and may be asked again."""


class MachineError(VqlError):
    """The machine lacks something: Java, the jars, space on the disk, a job service or its workers."""

    exit_code = 6


class GateError(VqlError):
    """A release that was judged is not good enough to be promoted."""

    exit_code = 8
