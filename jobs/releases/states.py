"""What a checkpoint is on its way from training to rankers and out of use, and which step leads where. Knows no table.

    trained -> gated -> backfilled -> shadow -> live -> retired
                                        |        |  ^
                                        |        v  |
                                        |      standby -> retired
                                        v
                                     retired

The history is a list of entries that only grows; the last entry of a checkpoint is its state. A step gives the
entries that it adds: none where it was done already, so a step that was cut off is simply done again.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum

import msgspec

from models.errors import InputError


class State(StrEnum):
    """standby: was live, and its rows are kept up to date, so that a rollback is one flip."""

    TRAINED = "trained"
    GATED = "gated"
    BACKFILLED = "backfilled"
    SHADOW = "shadow"
    LIVE = "live"
    STANDBY = "standby"
    RETIRED = "retired"


# Whose rows a stream has to keep up to date.
STREAMED = (State.BACKFILLED, State.SHADOW, State.LIVE, State.STANDBY)
_REMEDIES = {
    State.TRAINED: "vql release gate",
    State.GATED: "vql release backfill",
    State.BACKFILLED: "vql release shadow",
    State.SHADOW: "vql release promote",
}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint came into a state. at_ms: Unix time. by: who ran the step. note: what it was decided from."""

    checkpoint_id: str
    path: str
    state: State
    at_ms: int
    by: str
    note: str = ""


class Releases(msgspec.Struct, frozen=True):
    """The history, oldest first."""

    entries: tuple[Entry, ...] = ()

    @property
    def current(self) -> dict[str, Entry]:
        """Each checkpoint's last entry, in the order in which these were made."""
        last: dict[str, Entry] = {}
        for entry in self.entries:
            last.pop(entry.checkpoint_id, None)
            last[entry.checkpoint_id] = entry
        return last

    @property
    def live(self) -> Entry | None:
        """What rankers read."""
        return next((entry for entry in self.current.values() if entry.state == State.LIVE), None)

    def named(self, name: str) -> Entry:
        """The checkpoint whose id begins so. Raises InputError unless there is exactly one."""
        found = [entry for checkpoint_id, entry in self.current.items() if checkpoint_id.startswith(name)]
        if len(found) != 1 or not name:
            known = ", ".join(self.current) or "none"
            raise InputError(f"release {name!r} names {len(found)} checkpoints; known are: {known}")
        return found[0]


Change = tuple[Entry, State]


def moved(entry: Entry, to: State, *, since: Sequence[State]) -> list[Change]:
    """This checkpoint into that state; nothing where it is there already. Raises InputError for a step out of turn."""
    if entry.state == to:
        return []
    if entry.state not in since:
        remedy = _REMEDIES.get(entry.state)
        raise InputError(
            f"release {entry.checkpoint_id} is {entry.state}, and cannot become {to}"
            + (f"; run {remedy} {entry.checkpoint_id} first" if remedy else "")
        )
    return [(entry, to)]


def promoted(releases: Releases, name: str) -> list[Change]:
    """Rankers read this one; the one that was live stands by. The first release has no other to be shadow of."""
    entry, live = releases.named(name), releases.live
    since = (State.SHADOW, State.STANDBY) if live is not None else (State.BACKFILLED, State.SHADOW, State.STANDBY)
    changes = moved(entry, State.LIVE, since=since)
    if changes and live is not None:
        changes.insert(0, (live, State.STANDBY))
    return changes


def rolled_back(releases: Releases, live_name: str) -> list[Change]:
    """Rankers read the release that was live before this one, which stands by.

    live_name: the release that is left, so that the same command again does not flip back.
    """
    leaving = releases.named(live_name)
    if leaving.state == State.STANDBY:
        return []
    if leaving.state != State.LIVE:
        raise InputError(f"release {leaving.checkpoint_id} is {leaving.state}, not live: there is nothing to roll back")
    standing_by = [entry for entry in releases.current.values() if entry.state == State.STANDBY]
    if not standing_by:
        raise InputError("no release stands by: there is none to go back to")
    return [(leaving, State.STANDBY), (standing_by[-1], State.LIVE)]


def retired(releases: Releases, name: str) -> list[Change]:
    """Out of use, whatever it was, unless rankers read it."""
    return moved(releases.named(name), State.RETIRED, since=[s for s in State if s != State.LIVE])
