"""What a Redis server says of itself, and what of that loses rows: for writers as they begin, and for `vql doctor`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import msgspec

from feature_repo.store import Fault
from models.errors import StoreError, UnavailableError

VERSION_MIN = (6, 2)
CLOCK_SKEW_S_MAX = 2.0
MEMORY_SHARE_MAX = 0.9
SECTIONS = ("server", "memory", "persistence", "replication")


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """What was asked of a server.

    info: its INFO. saves: its save points, None where it does not say, as managed servers and users without the right
    are not told. skew_s: its clock less this machine's; spread_s of that may be the way there and back.
    """

    info: dict[str, Any]
    saves: str | None
    skew_s: float
    spread_s: float

    def facts(self) -> dict[str, str]:
        """In words, by name."""
        return {
            "version": str(self.info.get("valkey_version") or self.info["redis_version"]),
            "maxmemory-policy": self.info["maxmemory_policy"],
            "memory": self._memory(),
            "persistence": self._persistence(),
            "role": str(self.info.get("role", "unknown")),
            "clock skew": f"{self.skew_s:+.3f} s against this machine",
        }

    def faults(self) -> Iterator[Fault]:
        """What would lose rows, or let them expire at another time than is thought."""
        info = self.info
        version = tuple(int(part) for part in str(info["redis_version"]).split(".")[:2])
        if version < VERSION_MIN:
            what = f"Redis {info['redis_version']} is too old"
            yield Fault(what=what, remedy="use 6.2 or newer, or Valkey", refused=True)
        if info["maxmemory_policy"] != "noeviction":
            yield Fault(
                what=f"the server evicts ({info['maxmemory_policy']}), which would make users new",
                remedy="set its maxmemory-policy to noeviction",
                refused=True,
            )
        if info.get("maxmemory") and info["used_memory"] > MEMORY_SHARE_MAX * info["maxmemory"]:
            what = f"memory is nearly full ({self._memory()})"
            yield Fault(what=what, remedy="raise maxmemory, or erase an unused checkpoint")
        if not info["aof_enabled"] and self.saves == "":
            yield Fault(
                what="nothing is kept on disk: a restart would lose every row",
                remedy="set appendonly to yes, or be ready to run vql backfill",
            )
        for name in ("aof_last_write_status", "rdb_last_bgsave_status"):
            if info.get(name, "ok") != "ok":
                yield Fault(what=f"{name} is {info[name]}", remedy="look at the server's log and its disk")
        if info.get("role") not in (None, "master"):
            yield Fault(what="the server is a replica and takes no puts", remedy="name the primary in VQL_REDIS_URL")
        if abs(self.skew_s) - self.spread_s > CLOCK_SKEW_S_MAX:
            yield Fault(
                what=f"the server's clock is {abs(self.skew_s):.1f} s from this machine's, and rows expire by the "
                "server's",
                remedy="synchronise both with NTP",
            )

    def _memory(self) -> str:
        limit = self.info.get("maxmemory")
        return f"{self.info['used_memory'] / 2**20:,.1f} MiB of {f'{limit / 2**20:,.1f} MiB' if limit else 'no limit'}"

    def _persistence(self) -> str:
        kept = ["append-only file"] if self.info["aof_enabled"] else []
        if self.saves is None:
            kept.append("snapshots unknown")
        elif self.saves:
            kept.append(f"snapshots ({self.saves})")
        return ", ".join(kept) or "none"


def server_state(
    ask: Callable[[Sequence[tuple[Any, ...]]], list[Any]], clock: Callable[[], float] = time.time
) -> ServerState:
    """Ask a server for its state, in two round trips that change nothing. Raises StoreError where it does not say."""
    before_s = clock()
    *infos, (seconds, micros) = ask([*(("INFO", section) for section in SECTIONS), ("TIME",)])
    after_s = clock()
    try:
        (saves,) = (answer.get("save", answer.get(b"save")) for answer in ask([("CONFIG GET", "save")]))
    except UnavailableError:
        raise
    except StoreError:
        saves = None
    return ServerState(
        info={name: value for each in infos for name, value in each.items()},
        saves=saves.decode() if isinstance(saves, bytes) else saves,
        # Between the request and its answer: half of that time is not the clocks' fault.
        skew_s=seconds + micros / 1e6 - (before_s + after_s) / 2,
        spread_s=(after_s - before_s) / 2,
    )
