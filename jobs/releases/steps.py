"""The steps of a release: what each does beside its entry in the table, and in which order, so that any may be cut off.

Work comes before its entry (a gate's report, a backfill's rows), deletion after it. So an entry never claims what is
not there, and nothing is deleted that the table says is in use.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from feature_repo.handle import StoreHandle
from feature_repo.store import Backfill, RowStore, require_filled
from jobs.releases.states import Entry, Releases, State, added, gated, promoted, retired, rolled_back, stepped
from jobs.releases.table import Step, read_releases, record
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import CheckpointError, GateError, InputError
from models.files import replace_file

if TYPE_CHECKING:
    from jobs.releases.gate import Judgement

# In the table's own folder; Delta leaves alone what begins with an underscore.
REPORTS = "_reports"


@dataclass(frozen=True, kw_only=True, slots=True)
class Operation:
    """On which releases, and whether it is only to be said what would be done."""

    table: Path
    dry_run: bool = False

    def read(self) -> Releases:
        return read_releases(self.table)

    def record(self, step: Step, note: str = "") -> list[Entry]:
        return record(self.table, step, note, self.dry_run)

    def report_path(self, checkpoint_id: str, against: str) -> Path:
        """Where the gate's report on a checkpoint is."""
        return self.table / REPORTS / f"gate-{checkpoint_id}-{against or 'no-live'}.json"


def add(operation: Operation, path: Path) -> list[Entry]:
    """Make a checkpoint known. Raises CheckpointError for none, InputError for one that rankers cannot serve."""
    checkpoint = open_checkpoint(path.resolve())
    if checkpoint.manifest.model != "vql":
        raise InputError(f"{path} holds a model {checkpoint.manifest.model!r}, which reads no cache; release vql")
    return operation.record(lambda now: added(now, checkpoint.checkpoint_id, str(checkpoint.path)))


def gate(operation: Operation, name: str, judge: Callable[[Checkpoint, Checkpoint | None], Judgement]) -> list[Entry]:
    """Judge a candidate against what is live, once for each that is. The report is written whatever the verdict is.

    Raises GateError, with the figures, for one that is refused and not forced.
    """
    now = operation.read()
    entry, live, against = now.named(name), now.live, now.live_id
    if not gated(now, name, against):
        return []
    judgement = judge(checkpoint_of(entry), None if live is None else checkpoint_of(live))
    if not operation.dry_run:
        path = operation.report_path(entry.checkpoint_id, against)
        replace_file(path, msgspec.json.format(msgspec.json.encode(judgement), indent=2))
    if not judgement.passed:
        raise GateError(f"release {entry.checkpoint_id} is refused: {judgement.verdict}; --force REASON overrules it")
    return operation.record(lambda then: gated(then, name, against), judgement.verdict)


def backfill(operation: Operation, name: str, store: StoreHandle, run: Callable[[Checkpoint], Backfill]) -> list[Entry]:
    """Write the rows of every user by `run`, unless the store has the record of that.

    Raises what `run` raises, and InputError where the release was retired meanwhile.
    """
    now = operation.read()
    entry = now.named(name)
    if operation.dry_run or not stepped(now, name, State.BACKFILLED):
        return operation.record(lambda then: stepped(then, name, State.BACKFILLED))
    checkpoint = checkpoint_of(entry)
    done = store.open().progress(checkpoint.checkpoint_id).backfill or run(checkpoint)
    note = f"{done.users:,} rows with {done.events:,} events, complete up to {done.cut}"
    try:
        return operation.record(lambda then: stepped(then, name, State.BACKFILLED), note)
    except InputError as error:
        remedy = f"its rows are to be deleted again: vql release retire {entry.checkpoint_id}"
        raise InputError(f"{error}; {remedy}") from error


def shadow(operation: Operation, name: str, rows: RowStore) -> list[Entry]:
    """Its rows are there and kept up to date: it may be scored beside the live one. Raises StoreError for no rows."""
    return operation.record(lambda now: _filled(stepped(now, name, State.SHADOW), rows))


def promote(operation: Operation, name: str, rows: RowStore, note: str = "") -> list[Entry]:
    """Rankers read this one within seconds. Raises StoreError for one without rows."""
    return operation.record(lambda now: _filled(promoted(now, name), rows), note)


def rollback(operation: Operation, name: str, note: str = "") -> list[Entry]:
    """Rankers read again what was live before this one. It needs nothing but the table."""
    return operation.record(lambda now: rolled_back(now, name), note)


def retire(operation: Operation, name: str, rows: RowStore, idle_s: float) -> tuple[list[Entry], int]:
    """Out of use for ever; and how many rows of its own were deleted, or would be. Again, it deletes what is left.

    idle_s: rankers need a while to follow what is live, so one that was live so shortly ago is refused (InputError).
    """
    now = operation.read()
    entry = now.named(name)
    if (left_ms := now.left_ms(entry.checkpoint_id)) is not None and retired(now, name):
        idle_for_s = time.time() - left_ms / 1000
        if idle_for_s < idle_s:
            raise InputError(
                f"release {entry.checkpoint_id} was live {idle_for_s:.0f} s ago: a ranker may still read it; wait "
                f"until it is {idle_s:.0f} s"
            )
    entries = operation.record(lambda then: retired(then, name))
    if operation.dry_run:
        return entries, rows.count_rows(entry.checkpoint_id)
    return entries, rows.delete_checkpoint(entry.checkpoint_id)


def checkpoint_of(entry: Entry) -> Checkpoint:
    """Raises CheckpointError where the release's path holds another checkpoint by now."""
    checkpoint = open_checkpoint(Path(entry.path))
    if checkpoint.checkpoint_id != entry.checkpoint_id:
        raise CheckpointError(
            f"{entry.path} holds checkpoint {checkpoint.checkpoint_id} and not release {entry.checkpoint_id}; put that "
            "back"
        )
    return checkpoint


def _filled(changes: list, rows: RowStore) -> list:
    """These changes, the last of which needs rows of its checkpoint."""
    if changes:
        require_filled(rows, changes[-1].checkpoint_id)
    return changes
