"""What state a store is in, and what is wrong with it: found without writing anything, for `vql doctor`.

A fault is what loses rows or lets readers and writers be refused, with what to do about it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from feature_repo.redis_scripts import GENERATION
from feature_repo.redis_state import server_state
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import Fault, Progress, RowStore

EMBEDDED = "embedded (SQLite)"


class CheckpointCondition(Progress, frozen=True, kw_only=True):
    """What the store holds of a checkpoint."""

    checkpoint_id: str
    rows: int


class Condition(msgspec.Struct, frozen=True, kw_only=True):
    """Facts in words, by name; checkpoints; faults."""

    facts: dict[str, str]
    checkpoints: list[CheckpointCondition]
    faults: list[Fault]


def examine(rows: RowStore, checkpoint_id: str | None = None, clock: Callable[[], float] = time.time) -> Condition:
    """The store's condition; with a checkpoint, it has to be there. Raises StoreError where it cannot be asked."""
    if isinstance(rows, SqliteRows):
        if not rows.path.exists():
            fault = Fault(what=f"there is no store at {rows.path}", remedy="run vql backfill, or name another --state")
            return Condition(facts={"kind": EMBEDDED, "file": str(rows.path)}, checkpoints=[], faults=[fault])
        facts, faults = _embedded(rows)
    else:
        facts, faults = _redis(rows, clock)
    checkpoints = [_checkpoint(rows, each) for each in rows.checkpoint_ids()]
    faults += [fault for each in checkpoints for fault in _checkpoint_faults(each)]
    if checkpoint_id is not None and checkpoint_id not in {each.checkpoint_id for each in checkpoints}:
        what = f"checkpoint {checkpoint_id} has no rows in this store"
        faults.append(Fault(what=what, remedy="run vql backfill with it, or name the store that has them"))
    return Condition(facts=facts, checkpoints=checkpoints, faults=faults)


def _checkpoint(rows: RowStore, checkpoint_id: str) -> CheckpointCondition:
    progress = rows.progress(checkpoint_id)
    return CheckpointCondition(
        checkpoint_id=checkpoint_id,
        rows=rows.count_rows(checkpoint_id),
        positions=progress.positions,
        backfill=progress.backfill,
    )


def _checkpoint_faults(found: CheckpointCondition) -> Iterator[Fault]:
    if not found.begun:
        yield Fault(
            what=f"checkpoint {found.checkpoint_id} has neither a backfill nor positions, so readers refuse it",
            remedy="run vql backfill, or wait until the stream has committed its first positions",
        )
    elif found.rows == 0:
        yield Fault(what=f"checkpoint {found.checkpoint_id} has no rows", remedy="run vql backfill")


def _embedded(rows: SqliteRows) -> tuple[dict[str, str], list[Fault]]:
    size_mb = rows.path.stat().st_size / 2**20
    facts = {
        "kind": EMBEDDED,
        "version": sqlite3.sqlite_version,
        "file": f"{rows.path}, {size_mb:,.1f} MiB",
        "persistence": "every commit of positions is on the disk",
    }
    damage = rows.damage()
    remedy = "move it away and run vql backfill"
    return facts, [Fault(what=f"the file {rows.path} is damaged: {damage}", remedy=remedy)] if damage else []


def _redis(rows: Any, clock: Callable[[], float]) -> tuple[dict[str, str], list[Fault]]:
    server = server_state(rows.ask, clock)
    (generation,) = rows.ask([("GET", GENERATION)])
    facts = {"kind": f"Redis at {rows.settings.url}", **server.facts()}
    facts["generation"] = generation.decode() if generation else "none"
    faults = list(server.faults())
    if generation is None:
        what = "the store has no generation: it was emptied, or never written to"
        faults.append(Fault(what=what, remedy="run vql backfill"))
    return facts, faults
