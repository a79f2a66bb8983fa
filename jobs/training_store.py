"""A training whose checkpoint goes to a URL (`jobs.checkpoint_store`), and its state with it.

While it runs, what another driver needs to go on (the versions that were pinned, the newest state of the trainer) is
copied to URL.training as it is saved. The same command, begun on a machine that has nothing, fetches it first; examples
are made again, and are the same. URL.training is removed once the checkpoint is there. One driver at a time: two would
do the same work twice, and give the same checkpoint.
"""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import structlog
from pyspark.sql import SparkSession

from jobs.checkpoint_store import Remote, fetch_checkpoint, holds_checkpoint, put_checkpoint
from jobs.train import TrainJob, digest, placeless, run_training
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.files import FileVersion, file_version

# In the order in which they are written there. A state needs what was written before it: it is linked first, so that
# the others are at least as new, and copied after them.
KEPT = ("pinned-*.json", "*/loss.jsonl", "*/best.pt", "*/state.pt", "*/final.pt")
LOOK_EVERY_S = 1.0
# Of the time, at most: the trainer shares the machine.
COPYING_SHARE = 0.1


def work_of(job: TrainJob, work: Path, destination: Path | str) -> Path:
    """Where a training works: a URL's has a folder of its own, which is as a new machine would have it."""
    return work / f"to-{digest([placeless(job), destination])}" if isinstance(destination, str) else work


def train_to(spark: SparkSession, job: TrainJob, work: Path, destination: Path | str, processes: int = 1) -> Checkpoint:
    """`run_training`, to a path or a URL. work: as `work_of`. Raises as that, and as `Remote`."""
    if not isinstance(destination, str):
        return run_training(spark, job, work, destination, processes)
    kept, out = Remote(f"{destination}.training"), work / "checkpoint"
    under_way = kept.names()
    if holds_checkpoint(destination):
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(fetch_checkpoint(destination), out)
    elif not under_way:
        # That of an earlier training, which was taken away from there.
        shutil.rmtree(out, ignore_errors=True)
    _fetch_missing(kept, under_way, work)
    try:
        with _copying(kept, work):
            made = run_training(spark, job, work, out, processes)
    except InputError as error:
        raise InputError(str(error).replace(str(out), destination)) from error
    if not holds_checkpoint(destination):
        put_checkpoint(made, destination)
    kept.remove()
    return made


def _fetch_missing(kept: Remote, names: list[str], work: Path) -> None:
    """What another machine left and this one has not; the state last: after a kill none lacks the rest."""
    own_state = any(work.glob("*/state.pt"))
    for name in sorted(names, key=lambda name: name.endswith("/state.pt")):
        if not (work / name).exists() and not (own_state and "/" in name):
            kept.get(name, work / name)


@contextmanager
def _copying(kept: Remote, work: Path) -> Iterator[None]:
    """What is saved meanwhile is copied, by a thread of its own."""
    over = threading.Event()
    copies = _Copies(kept, work)
    thread = threading.Thread(target=copies.until, args=(over,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


class _Copies:
    def __init__(self, kept: Remote, work: Path) -> None:
        self._kept, self._work = kept, work
        self._seen: dict[Path, FileVersion | None] = {}

    def until(self, over: threading.Event) -> None:
        wait_s = LOOK_EVERY_S
        while not over.wait(wait_s):
            begun_s = time.monotonic()
            try:
                self.copy()
            except Exception as error:
                # Whatever it is, the training goes on: what is lost is what could have been gone on from.
                structlog.get_logger().warning(
                    "the state of the training is not copied", error=f"{type(error).__name__}: {error}"
                )
            wait_s = max(LOOK_EVERY_S, (time.monotonic() - begun_s) * (1 / COPYING_SHARE - 1))

    def copy(self) -> None:
        """What has changed since the last time; the losses only when there is a state that needs them."""
        links: list[tuple[Path, Path]] = []
        try:
            for pattern in reversed(KEPT):
                links += [(file, link) for file in self._work.glob(pattern) if (link := self._linked(file))]
            if all(file_version(link) == self._seen.get(file) for file, link in links if file.suffix != ".jsonl"):
                return
            for file, link in reversed(links):
                version = file_version(link)
                if version != self._seen.get(file):
                    self._kept.put(link, file.relative_to(self._work).as_posix())
                    self._seen[file] = version
        finally:
            for _, link in links:
                link.unlink()

    def _linked(self, file: Path) -> Path | None:
        """The file as it is now: it will be replaced, not written anew. None where it is gone by now."""
        link = self._work / f".{digest(str(file))}.{os.getpid()}"
        link.unlink(missing_ok=True)
        try:
            os.link(file, link)
        except FileNotFoundError:
            return None
        return link
