"""The live checkpoint: what a path names now. A new one is loaded beside the old one and swapped whole.

The path is a table of releases, whose live one it is; or a checkpoint directory, a symbolic link to one, or a file
whose one line names one (relative to the file).
A batch takes the scorer once, so all of it is answered by one checkpoint. Item tables that have grown are seen the
same way.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import structlog

from jobs.releases.states import State
from jobs.releases.table import is_releases, release_in
from jobs.scoring import Scorer
from models.errors import CheckpointError, VqlError
from models.files import FileVersion, file_version

LOOK_EVERY_S = 1.0
_LINE_BYTES = 4096


class Version(NamedTuple):
    """What a path names now. checkpoint_id: of a release; a path by itself may name any."""

    folder: Path
    files: tuple[FileVersion | None, ...]
    checkpoint_id: str | None = None


class LiveScorer:
    """`scorer` is the live one; `look` swaps it. Reading it is safe from any thread.

    load: from a checkpoint's directory to a scorer that is warm. state: of the release to follow, where the path
    is a table of them.
    Raises CheckpointError, or what `load` raises, when there is no first one.
    """

    def __init__(self, path: Path, load: Callable[[Path], Scorer], state: State = State.LIVE) -> None:
        # A scorer that was swapped out is not closed: a batch may still use it. Its threads and connections end when
        # the last such batch lets it go.
        self._path, self._load, self._state = path, load, state
        self._turn = threading.Lock()
        self._seen = version_of(path, state)
        self.scorer = self._loaded(self._seen)
        self.problem: str | None = None
        structlog.get_logger().info("checkpoint loaded", checkpoint_id=self.scorer.checkpoint_id)

    def look(self) -> bool:
        """Whether the scorer was swapped. What cannot be loaded is logged and tried again at the next look."""
        with self._turn:
            try:
                version = version_of(self._path, self._state)
                if version == self._seen:
                    self.problem = None
                    return False
                fresh = self._loaded(version)
                # A checkpoint is backfilled before it goes live: without rows, every user would lose the history.
                fresh.reader.require_filled()
                # Files that changed meanwhile may be read half from each state.
                if version_of(self._path, self._state) != version:
                    return False
            except (VqlError, OSError) as error:
                if str(error) != self.problem:
                    structlog.get_logger().error("the checkpoint has changed and cannot be used", error=str(error))
                self.problem = str(error)
                return False
            old, self.scorer, self._seen, self.problem = self.scorer, fresh, version, None
        structlog.get_logger().info("checkpoint swapped", checkpoint_id=fresh.checkpoint_id, before=old.checkpoint_id)
        return True

    def _loaded(self, version: Version) -> Scorer:
        scorer = self._load(version.folder)
        if version.checkpoint_id not in (None, scorer.checkpoint_id):
            raise CheckpointError(
                f"release {version.checkpoint_id} is live, and {version.folder} holds checkpoint "
                f"{scorer.checkpoint_id}; put the release's own back"
            )
        return scorer


def version_of(path: Path, state: State = State.LIVE) -> Version:
    """The directory that the path names, and the times and inodes of what tells one state of it from another.

    Of a table of releases, the newest one in this state. Raises CheckpointError for a path that names none, StoreError
    for a table that cannot be read.
    """
    if not is_releases(path):
        return _version(path)
    release = release_in(path, state)
    return _version(Path(release.path), release.checkpoint_id)


def _version(path: Path, checkpoint_id: str | None = None) -> Version:
    folder = _folder(path)
    files = tuple(file_version(folder / name) for name in ("manifest.json", "items/items.json"))
    return Version(folder, files, checkpoint_id)


def _folder(path: Path) -> Path:
    if path.is_dir():
        return path.resolve()
    try:
        with path.open("rb") as file:
            named = file.read(_LINE_BYTES).decode().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is neither a checkpoint nor a file that names one ({error})") from error
    folder = path.resolve().parent / named
    if not named or "\n" in named or not folder.is_dir():
        raise CheckpointError(f"{path} names {named[:200]!r}, which is no directory; write a checkpoint's path into it")
    return folder.resolve()
