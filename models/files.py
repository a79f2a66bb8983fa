"""Files that are either whole or absent: atomic replacement, hashes, and a full disk said plainly."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import io
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from models.errors import MachineError

# Time of change (ns), inode, size.
FileVersion = tuple[int, int, int]


def sha256_file(path: Path) -> str:
    """The hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_file(path: Path, data: bytes) -> None:
    """Write `data` so that a reader, or a restart after a kill, sees the old file or the new one, never a part.

    Raises MachineError when the disk is full.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_native_id()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise disk_error(error, path) from error


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time in this folder, which is made if need be; says so when it has to wait."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process to finish in {folder}", file=sys.stderr, flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def replace_array(path: Path, array: np.ndarray) -> None:
    """`replace_file` with an array, as numpy.load reads it."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    replace_file(path, buffer.getvalue())


def disk_error(error: OSError, path: Path) -> Exception:
    """A full disk as a MachineError with the path and the remedy; any other OSError as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return MachineError(f"no space left to write {path}; free some and run the same command again")
    return error


def file_version(path: Path) -> FileVersion | None:
    """What tells one state of a file from another that replaced it; None where it cannot be looked at."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino, found.st_size
