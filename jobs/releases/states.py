"""What a checkpoint is on its way from training to rankers and out of use, and which step leads where. Knows no table.

    trained -> gated -> backfilled -> shadow -> live <-> standby        any of these but live -> retired
                            '------------------^ the first release has no other to be shadow of

The history is a list of entries that only grows; the last entry of a checkpoint is its state. A step gives the
entries that it adds, none where it was done already: a step that was cut off, or a whole script of them, is simply
run again. Each step judges what is there when its entries are written, so of two operators one may be refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

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
# What a release was judged against when nothing was live.
NO_LIVE = ""
_WAY = (State.TRAINED, State.GATED, State.BACKFILLED, State.SHADOW, State.LIVE)
_NEXT_STEP = {
    State.TRAINED: "vql release gate",
    State.GATED: "vql release backfill",
    State.BACKFILLED: "vql release shadow",
    State.SHADOW: "vql release promote",
}


class Entry(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint came into a state, or was judged anew in it.

    at_ms: Unix time. by: who ran the step. note: what it was decided from. against: of a judgement, the id of what was
    live (NO_LIVE: nothing); None for all other entries.
    """

    checkpoint_id: str
    path: str
    state: State
    at_ms: int
    by: str
    note: str = ""
    against: str | None = None


class Change(NamedTuple):
    """An entry to be added: this checkpoint into that state."""

    checkpoint_id: str
    path: str
    to: State
    against: str | None = None


class Releases(msgspec.Struct, frozen=True):
    """The history, oldest first."""

    entries: tuple[Entry, ...] = ()

    @property
    def current(self) -> dict[str, Entry]:
        """Each checkpoint's last entry, in the order in which the checkpoints were added."""
        return {entry.checkpoint_id: entry for entry in self.entries}

    @property
    def live(self) -> Entry | None:
        """What rankers read."""
        return next((entry for entry in self.current.values() if entry.state == State.LIVE), None)

    @property
    def live_id(self) -> str:
        """The live checkpoint's id; NO_LIVE where there is none."""
        return NO_LIVE if self.live is None else self.live.checkpoint_id

    def named(self, name: str) -> Entry:
        """The release of this id, of the one id that begins so, or at this path. Raises InputError for none or many."""
        current = self.current
        at_path = [entry for entry in current.values() if entry.path == name]
        found = at_path or [entry for each, entry in current.items() if name and each.startswith(name)]
        if len(found) == 1:
            return found[0]
        known = ", ".join(current) or "none; vql release add makes one known"
        raise InputError(f"release {name!r} names {len(found)} checkpoints; known are: {known}")

    def judged(self, checkpoint_id: str) -> bool:
        """Whether it was judged against what is live now."""
        return any(e.checkpoint_id == checkpoint_id and e.against == self.live_id for e in self.entries)

    def left_ms(self, checkpoint_id: str) -> int | None:
        """When it was live last, if it ever was and is not now."""
        left = [e.at_ms for e in self.entries if e.checkpoint_id == checkpoint_id and e.state == State.STANDBY]
        return left[-1] if left else None

    def before_live(self) -> Entry | None:
        """The release that the live one took over from, and, where that is retired, the one before, and so on.

        One that was left by a rollback is not gone back to by the next rollback.
        """
        took_over: list[str] = []
        for entry in self.entries:
            if entry.state == State.LIVE and entry.checkpoint_id in took_over:
                took_over = took_over[: took_over.index(entry.checkpoint_id) + 1]
            elif entry.state == State.LIVE:
                took_over.append(entry.checkpoint_id)
        standing = [self.current[each] for each in took_over if self.current[each].state == State.STANDBY]
        return standing[-1] if standing else None


def added(releases: Releases, checkpoint_id: str, path: str) -> list[Change]:
    """A checkpoint becomes known. Raises InputError for one that was retired, or is known at another path."""
    known = releases.current.get(checkpoint_id)
    if known is None:
        return [Change(checkpoint_id, path, State.TRAINED)]
    if known.state == State.RETIRED:
        raise InputError(f"release {checkpoint_id} is retired and does not come back; train another one")
    if known.path != path:
        raise InputError(f"release {checkpoint_id} is at {known.path} already; leave it there, or retire it first")
    return []


def gated(releases: Releases, name: str, against: str) -> list[Change]:
    """It was judged against what was live (its id), and passed. Judged again because another is live: same state.

    Raises InputError where another is live by now.
    """
    entry = releases.named(name)
    _require_not_retired(entry, State.GATED)
    if entry.state in (State.LIVE, State.STANDBY) or releases.judged(entry.checkpoint_id):
        return []
    if against != releases.live_id:
        raise InputError(
            f"release {entry.checkpoint_id} was judged against {against or 'nothing live'}, and "
            f"{releases.live_id or 'nothing'} is live now; run vql release gate {entry.checkpoint_id} again"
        )
    return [_change(entry, State.GATED if entry.state == State.TRAINED else entry.state, against)]


def stepped(releases: Releases, name: str, to: State) -> list[Change]:
    """The next step of the way; none where it was gone already. Raises InputError for one out of turn."""
    entry = releases.named(name)
    _require_not_retired(entry, to)
    if entry.state == State.STANDBY or _WAY.index(entry.state) >= _WAY.index(to):
        return []
    if _WAY.index(entry.state) + 1 < _WAY.index(to):
        raise _out_of_turn(entry, to)
    return [_change(entry, to)]


def promoted(releases: Releases, name: str) -> list[Change]:
    """Rankers read this one; the one that was live stands by. What has been live before needs no second judgement.

    Raises InputError for one out of turn, or judged against another than what is live now.
    """
    entry, live = releases.named(name), releases.live
    if entry.state == State.LIVE:
        return []
    if entry.state not in (State.SHADOW, State.STANDBY, *([State.BACKFILLED] if live is None else [])):
        raise _out_of_turn(entry, State.LIVE)
    if entry.state != State.STANDBY and not releases.judged(entry.checkpoint_id):
        raise InputError(
            f"release {entry.checkpoint_id} was not judged against what is live now, {releases.live_id or 'nothing'}; "
            f"run vql release gate {entry.checkpoint_id} again"
        )
    return [*([] if live is None else [_change(live, State.STANDBY)]), _change(entry, State.LIVE)]


def rolled_back(releases: Releases, name: str) -> list[Change]:
    """Rankers read what was live before this one, which stands by.

    name: the release that is left, so that the same command again does not flip back.
    """
    leaving = releases.named(name)
    if leaving.state == State.STANDBY:
        return []
    if leaving.state != State.LIVE:
        raise InputError(f"release {leaving.checkpoint_id} is {leaving.state}, not live: there is nothing to roll back")
    before = releases.before_live()
    if before is None:
        raise InputError(f"nothing that was live before {leaving.checkpoint_id} stands by; vql release promote another")
    return [_change(leaving, State.STANDBY), _change(before, State.LIVE)]


def retired(releases: Releases, name: str) -> list[Change]:
    """Out of use for ever. Raises InputError for what rankers read."""
    entry = releases.named(name)
    if entry.state == State.LIVE:
        raise InputError(f"release {entry.checkpoint_id} is live: rankers read it; promote another or roll back first")
    return [] if entry.state == State.RETIRED else [_change(entry, State.RETIRED)]


def _change(entry: Entry, to: State, against: str | None = None) -> Change:
    return Change(entry.checkpoint_id, entry.path, to, against)


def _require_not_retired(entry: Entry, to: State) -> None:
    if entry.state == State.RETIRED:
        raise _out_of_turn(entry, to)


def _out_of_turn(entry: Entry, to: State) -> InputError:
    step = _NEXT_STEP.get(entry.state)
    remedy = f"; run {step} {entry.checkpoint_id} first" if step else " any more"
    return InputError(f"release {entry.checkpoint_id} is {entry.state}, and cannot become {to}{remedy}")


def summary(added_entries: Sequence[Entry]) -> str:
    """What the entries say, in a line."""
    return ", ".join(f"{entry.checkpoint_id} is {entry.state}" for entry in added_entries)
