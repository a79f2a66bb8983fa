"""Where a stream starts and ends in its log: decided and checked before anything runs.

Everything at or below a committed position, and at or below the backfill's cut, is in the rows. So a stream starts
at the later of the two; starting further on would leave a hole that no stamp shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from feature_repo.store import Backfill
from models.errors import InputError, StoreError
from pipelines.delta_source import Log
from pipelines.records import Slice


@dataclass(frozen=True, kw_only=True, slots=True)
class Shard:
    """Share `index` of `count` of a log, whatever its number of partitions: those whose number leaves this rest."""

    index: int
    count: int

    def __post_init__(self) -> None:
        if self.count < 1:
            raise InputError(f"shard {self.index}/{self.count}: N is to be 1 or more")
        if not 0 <= self.index < self.count:
            last = self.count - 1
            raise InputError(
                f"shard {self.index}/{self.count}: shards of {self.count} are 0/{self.count} to {last}/{self.count}"
            )

    def of(self, log: OpenedLog) -> tuple[int, ...]:
        """Raises InputError where nothing is left for it."""
        mine = tuple(partition for partition in log.ends if partition % self.count == self.index)
        if not mine:
            raise InputError(
                f"shard {self.index}/{self.count} has no partition of {log.path}, which has {len(log.ends)}; run at "
                f"most {len(log.ends)} shards"
            )
        return mine


class OpenedLog(Protocol):
    """A log as it was when opened: what messages call it, its epoch, and the last offset of each partition."""

    @property
    def path(self) -> object: ...

    @property
    def epoch(self) -> int: ...

    @property
    def ends(self) -> Mapping[int, int]: ...


def slices(
    log: OpenedLog,
    positions: Mapping[int, int],
    partitions: tuple[int, ...] | Shard | None,
    until: Literal["end", "forever"],
) -> tuple[Slice, ...]:
    """The parts of the log to read; partitions None: all. Raises InputError for partitions that it does not have."""
    if isinstance(partitions, Shard):
        chosen = partitions.of(log)
    else:
        chosen = tuple(log.ends) if partitions is None else partitions
    unknown = sorted(set(chosen) - set(log.ends))
    if unknown or not chosen:
        raise InputError(
            f"partitions {unknown or chosen} are not in log {log.path}, which has 0 to {len(log.ends) - 1}"
        )
    return tuple(
        Slice(
            partition=partition,
            after_offset=positions[partition],
            until_offset=log.ends[partition] if until == "end" else None,
        )
        for partition in chosen
    )


def start_positions(
    log: Log,
    committed: Mapping[int, tuple[int, int]],
    backfill: Backfill | None,
    start: Literal["resume", "earliest"],
) -> dict[int, int]:
    """The offset after which each partition of the log is to be read. Raises StoreError, also as known_positions."""
    known = known_positions(log, committed, backfill)
    missing = [partition for partition in log.ends if partition not in known]
    if missing and start == "resume":
        raise StoreError(
            f"partitions {missing} of {log.path} were never backfilled; run vql backfill, or start with --from earliest"
        )
    return dict.fromkeys(log.ends, -1) if start == "earliest" else known


def known_positions(
    log: OpenedLog, committed: Mapping[int, tuple[int, int]], backfill: Backfill | None
) -> dict[int, int]:
    """The offset of each partition up to which everything is in the rows: the later of commit and backfill's cut.

    A partition that the backfill did not meet has nothing in the rows; one is absent where neither exists. Raises
    StoreError when either is of another epoch, or further, than the log.
    """
    # A backfill of a new epoch speaks for every partition, also for those that the log no longer has.
    known = {p: at for p, at in committed.items() if backfill is None or at[0] >= backfill.epoch}
    if backfill is not None:
        for partition in log.ends:
            cut = (backfill.epoch, backfill.cut.get(partition, -1))
            known[partition] = max(cut, known.get(partition, cut))
    for partition, (epoch, offset) in known.items():
        if epoch != log.epoch or partition not in log.ends:
            raise StoreError(
                f"the rows hold partition {partition} of epoch {epoch}, but {log.path} has {len(log.ends)} partitions "
                f"of epoch {log.epoch}; run vql backfill for this log, or name the log of epoch {epoch}"
            )
        if offset > log.ends[partition]:
            raise StoreError(
                f"the rows hold partition {partition} up to offset {offset}, but {log.path} ends at "
                f"{log.ends[partition]}; restore the log, or wait until the ingest has caught up"
            )
    return {partition: offset for partition, (_, offset) in known.items()}
