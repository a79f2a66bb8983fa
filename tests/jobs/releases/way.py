"""Releases taken some way, for tests: by the steps of states alone, and by those of a table."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from jobs.releases.states import Change, Entry, Releases, State, added, gated, promoted, stepped
from jobs.releases.table import record


class History:
    """Releases in memory; `do` is what jobs.releases.table.record does."""

    def __init__(self) -> None:
        self.now = Releases()

    def do(self, changes: Sequence[Change]) -> list[State]:
        """The states that these changes add."""
        start_ms = len(self.now.entries)
        new = [
            Entry(
                checkpoint_id=c.checkpoint_id, path=c.path, state=c.to, at_ms=start_ms + n, by="me", against=c.against
            )
            for n, c in enumerate(changes)
        ]
        self.now = Releases((*self.now.entries, *new))
        return [entry.state for entry in new]

    def ready(self, name: str) -> None:
        """As far as shadow, judged against what is live."""
        self.do(added(self.now, name, f"/{name}"))
        self.do(gated(self.now, name, self.now.live_id))
        self.do(stepped(self.now, name, State.BACKFILLED))
        self.do(stepped(self.now, name, State.SHADOW))

    def live(self, name: str) -> None:
        self.ready(name)
        self.do(promoted(self.now, name))

    def states(self) -> dict[str, str]:
        return {name: str(entry.state) for name, entry in self.now.current.items()}


def take_to_backfilled(table: Path, checkpoint_id: str, path: Path) -> None:
    """A release as far as that, judged against what is live."""
    record(table, lambda now: added(now, checkpoint_id, str(path)))
    record(table, lambda now: gated(now, checkpoint_id, now.live_id), "judged elsewhere")
    record(table, lambda now: stepped(now, checkpoint_id, State.BACKFILLED))


def take_to_shadow(table: Path, checkpoint_id: str, path: Path) -> None:
    take_to_backfilled(table, checkpoint_id, path)
    record(table, lambda now: stepped(now, checkpoint_id, State.SHADOW))


def take_live(table: Path, checkpoint_id: str, path: Path) -> None:
    take_to_shadow(table, checkpoint_id, path)
    record(table, lambda now: promoted(now, checkpoint_id))
