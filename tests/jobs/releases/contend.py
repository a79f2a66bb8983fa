"""What processes do to one table at the same moment; they are spawned, so it has a file of its own."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.synchronize import Barrier
from pathlib import Path

from jobs.releases.states import added, promoted
from jobs.releases.table import record
from models.errors import InputError

_barrier: Barrier


def _begin(barrier: Barrier) -> None:
    global _barrier
    _barrier = barrier


def at_once(act: Callable[[Path, str], str], table: Path, names: Sequence[str]) -> list[str]:
    """What each says, in the order of the names; each in a process of its own, let go at one moment."""
    spawn = multiprocessing.get_context("spawn")
    barrier = spawn.Barrier(len(names))
    with ProcessPoolExecutor(len(names), spawn, _begin, (barrier,)) as pool:
        return list(pool.map(act, [table] * len(names), names))


def add(table: Path, name: str) -> str:
    _barrier.wait(120)
    return "".join(entry.state for entry in record(table, lambda now: added(now, name, f"/{name}")))


def promote(table: Path, name: str) -> str:
    _barrier.wait(120)
    try:
        return " ".join(f"{e.checkpoint_id} {e.state}" for e in record(table, lambda now: promoted(now, name)))
    except InputError as error:
        return str(error)
