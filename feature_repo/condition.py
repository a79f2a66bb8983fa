"""What state a store is in, and what is wrong with it: found without writing anything, for `vql doctor`.

A fault is what loses rows or lets readers and writers be refused, with what to do about it.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from feature_repo.redis_scripts import GENERATION
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import Backfill, Progress, RowStore
from models.errors import StoreError

EMBEDDED = "embedded (SQLite)"
REDIS_VERSION_MIN = (6, 2)
CLOCK_SKEW_S_MAX = 2.0
MEMORY_SHARE_MAX = 0.9


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """What is wrong, and what to do."""

    what: str
    remedy: str


class CheckpointCondition(msgspec.Struct, frozen=True, kw_only=True):
    """What the store holds of a checkpoint; positions are (epoch, offset) by partition."""

    checkpoint_id: str
    rows: int
    positions: dict[int, tuple[int, int]]
    backfill: Backfill | None


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
            return Condition(
                facts={"kind": "embedded (SQLite)", "file": str(rows.path)}, checkpoints=[], faults=[fault]
            )
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
    if not Progress(positions=found.positions, backfill=found.backfill).begun:
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
    before_s = clock()
    asked = [("INFO", "server"), ("INFO", "memory"), ("INFO", "persistence"), ("INFO", "replication")]
    *infos, (seconds, micros), generation = rows.ask([*asked, ("TIME",), ("GET", GENERATION)])
    info: dict[str, Any] = {name: value for each in infos for name, value in each.items()}
    # Between the request and its answer: half of that time is not the clocks' fault.
    around_s, spread_s = (before_s + clock()) / 2, (clock() - before_s) / 2
    skew_s = seconds + micros / 1e6 - around_s
    saves = _save_points(rows)
    facts = {
        "kind": f"Redis at {rows.settings.url}",
        "version": str(info.get("valkey_version") or info["redis_version"]),
        "maxmemory-policy": info["maxmemory_policy"],
        "memory": _memory(info),
        "persistence": _persistence(info, saves),
        "role": str(info.get("role", "unknown")),
        "clock skew": f"{skew_s:+.3f} s against this machine",
        "generation": generation.decode() if generation else "none",
    }
    return facts, list(_redis_faults(info, saves, generation, max(0.0, abs(skew_s) - spread_s)))


def _redis_faults(
    info: Mapping[str, Any], saves: str | None, generation: bytes | None, skew_s: float
) -> Iterator[Fault]:
    version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
    if version < REDIS_VERSION_MIN:
        yield Fault(what=f"Redis {info['redis_version']} is too old", remedy="use 6.2 or newer, or Valkey")
    if info["maxmemory_policy"] != "noeviction":
        yield Fault(
            what=f"the server evicts ({info['maxmemory_policy']}), which would make users new",
            remedy="set its maxmemory-policy to noeviction",
        )
    if info.get("maxmemory") and info["used_memory"] > MEMORY_SHARE_MAX * info["maxmemory"]:
        yield Fault(
            what=f"memory is nearly full ({_memory(info)})", remedy="raise maxmemory, or erase an unused checkpoint"
        )
    if not info["aof_enabled"] and saves == "":
        yield Fault(
            what="nothing is kept on disk: a restart would lose every row",
            remedy="set appendonly to yes, or be ready to run vql backfill",
        )
    for name in ("aof_last_write_status", "rdb_last_bgsave_status"):
        if info.get(name, "ok") != "ok":
            yield Fault(what=f"{name} is {info[name]}", remedy="look at the server's log and its disk")
    if info.get("role") not in (None, "master"):
        yield Fault(what="the server is a replica and takes no puts", remedy="name the primary in VQL_REDIS_URL")
    if skew_s > CLOCK_SKEW_S_MAX:
        yield Fault(
            what=f"the server's clock is {skew_s:.1f} s from this machine's, and rows expire by the server's",
            remedy="synchronise both with NTP",
        )
    if generation is None:
        yield Fault(what="the store has no generation: it was emptied, or never written to", remedy="run vql backfill")


def _save_points(rows: Any) -> str | None:
    """The server's save points; None where it does not say, as managed servers do not."""
    try:
        (answer,) = rows.ask([("CONFIG GET", "save")])
    except StoreError:
        return None
    return answer.get("save", answer.get(b"save"))


def _memory(info: Mapping[str, Any]) -> str:
    limit = info.get("maxmemory")
    return f"{info['used_memory'] / 2**20:,.1f} MiB of {f'{limit / 2**20:,.1f} MiB' if limit else 'no limit'}"


def _persistence(info: Mapping[str, Any], saves: str | None) -> str:
    kept = ["append-only file"] if info["aof_enabled"] else []
    if saves is None:
        kept.append("snapshots unknown")
    elif saves:
        kept.append(f"snapshots ({saves if isinstance(saves, str) else saves.decode()})")
    return ", ".join(kept) or "none"
