"""Checkpoints at URLs (fsspec): in an object store, or in any folder that is named by one.

A checkpoint is written with its manifest last, so where there is a manifest all of it is there. It is read into a cache
of this machine, once for each checkpoint id, and verified there by its hashes like any other. The item table, which
grows, is fetched anew each time.

fsspec knows file:// and memory:// by itself; s3://, abfs:// and gs:// need s3fs, adlfs or gcsfs beside it, and take
address and secrets from these packages' own environment variables.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path, PurePosixPath

import fsspec
import msgspec
from fsspec.implementations.local import LocalFileSystem

from models.checkpoint import Checkpoint, Manifest, identify, open_checkpoint
from models.errors import CheckpointError, InputError, MachineError, MismatchError
from models.files import disk_error, replace_file, sha256_file
from models.item_table import decode_index, read_index

MANIFEST, ITEMS = "manifest.json", "items/items.json"


def cache_folder() -> Path:
    """Where fetched checkpoints are kept: $VQL_CHECKPOINT_CACHE, else the user's cache folder."""
    default = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "vql" / "checkpoints"
    return Path(os.environ.get("VQL_CHECKPOINT_CACHE", default))


class Remote:
    """The files below a URL. All raise MachineError where the place cannot be reached or a package is missing."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        try:
            self._files, self._root = fsspec.url_to_fs(self.url)
        except ImportError as error:
            raise MachineError(f"{url} needs a package that is not installed: {error}") from error
        except ValueError as error:
            raise InputError(f"{url} cannot be used: {error}") from error

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None where there is no such file."""
        with self._reaching(name):
            try:
                return self._files.cat_file(self._path(name))
            except (FileNotFoundError, NotADirectoryError):
                return None

    def get(self, name: str, to: Path) -> None:
        """Copy a file to here, whole or not at all."""
        partial_ = to.with_name(f".{to.name}.{os.getpid()}")
        with self._reaching(name):
            to.parent.mkdir(parents=True, exist_ok=True)
            try:
                self._files.get_file(self._path(name), str(partial_))
                partial_.replace(to)
            finally:
                partial_.unlink(missing_ok=True)

    def put(self, source: Path, name: str) -> None:
        """Copy a file there, whole or not at all."""
        path = self._path(name)
        with self._reaching(name):
            if isinstance(self._files, LocalFileSystem):
                # In a folder a file is seen while it is written; an object is not.
                there = Path(path)
                there.parent.mkdir(parents=True, exist_ok=True)
                partial_ = there.with_name(f".{there.name}.{os.getpid()}")
                shutil.copyfile(source, partial_)
                partial_.replace(there)
            else:
                self._files.put_file(str(source), path)

    def names(self) -> list[str]:
        """Every file below, by its path from here; none where there is nothing."""
        with self._reaching(""):
            try:
                found = self._files.find(self._root)
            except FileNotFoundError:
                return []
        return [str(PurePosixPath(path).relative_to(self._root)) for path in found]

    def remove(self) -> None:
        """All of it; nothing is no error."""
        with self._reaching(""):
            self._files.invalidate_cache()
            if self._files.exists(self._root):
                self._files.rm(self._root, recursive=True)

    def _path(self, name: str) -> str:
        return f"{self._root.rstrip('/')}/{name}"

    @contextmanager
    def _reaching(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            full = disk_error(error, Path(name))
            if full is not error:
                raise full from error
            raise MachineError(f"{self.url}/{name} cannot be reached: {type(error).__name__}: {error}") from error


def holds_checkpoint(url: str) -> bool:
    return Remote(url).read(MANIFEST) is not None


def put_checkpoint(checkpoint: Checkpoint, url: str) -> None:
    """Copy a checkpoint there, its item table too if it has one; the manifest last."""
    there = Remote(url)
    for name in checkpoint.manifest.files:
        there.put(checkpoint.path / name, name)
    if (checkpoint.path / ITEMS).is_file():
        put_items(checkpoint.path, url)
    there.put(checkpoint.path / MANIFEST, MANIFEST)


def fetch_checkpoint(url: str) -> Path:
    """The checkpoint's folder in the cache, its item table as it is there now.

    Raises CheckpointError where there is none, or one that is damaged or not whole; else as `Remote`.
    """
    there = Remote(url)
    raw = there.read(MANIFEST)
    if raw is None:
        raise CheckpointError(f"{url} is no checkpoint: it has no manifest.json (vql train makes one)")
    folder = cache_folder() / identify(raw)
    if not _is_whole(folder):
        _fetch(there, raw, folder)
    _fetch_items(there, folder)
    return folder


def put_items(folder: Path, url: str) -> None:
    """Copy the item table there, its index last. Raises MismatchError if it has grown there by others meanwhile."""
    there, index = Remote(url), read_index(folder / "items")
    raw = there.read(ITEMS)
    known = [] if raw is None else decode_index(raw, f"{url}/{ITEMS}").segments
    if index.segments[: len(known)] != known:
        raise MismatchError(f"the items of {url} were encoded by another run meanwhile; run vql encode-items again")
    for segment in index.segments[len(known) :]:
        there.put(folder / "items" / segment.name, f"items/{segment.name}")
    there.put(folder / ITEMS, ITEMS)


def _is_whole(folder: Path) -> bool:
    """What was damaged in the cache is fetched again."""
    try:
        return open_checkpoint(folder).checkpoint_id == folder.name
    except CheckpointError:
        return False


def _fetch(there: Remote, raw: bytes, folder: Path) -> None:
    partial_ = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        for name in _names(raw, there.url):
            _wanted(there.url, name, partial(there.get, name, partial_ / name))
        replace_file(partial_ / MANIFEST, raw)
        open_checkpoint(partial_)
        shutil.rmtree(folder, ignore_errors=True)
        partial_.replace(folder)
    except OSError:
        # Another process has just put the same one there.
        if not _is_whole(folder):
            raise
    finally:
        shutil.rmtree(partial_, ignore_errors=True)


def _names(raw: bytes, url: str) -> list[str]:
    try:
        names = list(msgspec.json.decode(raw, type=Manifest).files)
    except msgspec.MsgspecError as error:
        raise CheckpointError(f"{url}/{MANIFEST} is damaged or of another version: {error}") from error
    if outside := [name for name in names if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]:
        raise CheckpointError(f"{url}/{MANIFEST} names files outside of the checkpoint: {outside}")
    return names


def _fetch_items(there: Remote, folder: Path) -> None:
    raw = there.read(ITEMS)
    if raw is None:
        return
    for segment in decode_index(raw, f"{there.url}/{ITEMS}").segments:
        file = folder / "items" / segment.name
        if not file.is_file() or sha256_file(file) != segment.sha256:
            _wanted(there.url, segment.name, partial(there.get, f"items/{segment.name}", file))
    replace_file(folder / ITEMS, raw)


def _wanted(url: str, name: str, get: Callable[[], None]) -> None:
    """A file that is missing is a fault of the checkpoint, not of the way to it."""
    try:
        get()
    except MachineError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(f"{url}/{name} is missing; copy the checkpoint there again") from error
        raise
