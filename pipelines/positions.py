"""Where a stream starts and ends in its log: decided and checked before anything runs.

Everything at or below a committed position, and at or below the backfill's cut, is in the rows. So a stream starts
at the later of the two; starting further on would leave a hole that no stamp shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from feature_repo.store import Backfill
from models.errors import InputError, StoreError
from pipelines.delta_source import Log
from pipelines.records import Slice


def slices(
    log: Log, positions: Mapping[int, int], partitions: tuple[int, ...] | None, until: Literal["end", "forever"]
) -> tuple[Slice, ...]:
    """The parts of the log to read; partitions None: all. Raises InputError for partitions that it does not have."""
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
    """The offset after which each partition of the log is to be read.

    Everything at or below the later of the committed position and the backfill's cut is in the rows. A partition
    that the backfill did not meet starts at its beginning. Raises StoreError when neither exists, and when either
    is of another epoch, or further, than the log.
    """
    known = dict(committed)
    if backfill is not None:
        for partition in log.ends:
            cut = (backfill.epoch, backfill.cut.get(partition, -1))
            known[partition] = max(cut, known.get(partition, cut))
    missing = [partition for partition in log.ends if partition not in known]
    if missing and start == "resume":
        raise StoreError(
            f"partitions {missing} of {log.path} were never backfilled; run vql backfill, or start with --from earliest"
        )
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
    if start == "earliest":
        return dict.fromkeys(log.ends, -1)
    return {partition: known[partition][1] for partition in log.ends}
