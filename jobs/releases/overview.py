"""What `vql release list` shows: each release with its rows, and how far they are behind those of the others."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from feature_repo.store import Progress, RowStore
from jobs.releases.states import STREAMED, Entry, Releases


class Overview(Entry, frozen=True, kw_only=True):
    """A release now. rows: of its own in the store. behind: events that another release's rows include and its do not.

    Both None where no store was asked, and behind also where its rows are not to be kept up to date, or are of an
    older epoch.
    """

    rows: int | None = None
    behind: int | None = None


def overview(releases: Releases, rows: RowStore | None) -> list[Overview]:
    """All releases, in the order in which they were added. Raises StoreError as the store does."""
    entries = list(releases.current.values())
    if rows is None:
        return [Overview(**msgspec.structs.asdict(entry)) for entry in entries]
    reached = {e.checkpoint_id: _reached(rows.progress(e.checkpoint_id)) for e in entries if e.state in STREAMED}
    furthest: dict[int, tuple[int, int]] = {}
    for each in reached.values():
        for partition, position in each.items():
            furthest[partition] = max(position, furthest.get(partition, position))
    return [
        Overview(
            **msgspec.structs.asdict(entry),
            rows=rows.count_rows(entry.checkpoint_id),
            behind=_behind(reached.get(entry.checkpoint_id), furthest),
        )
        for entry in entries
    ]


def _reached(progress: Progress) -> dict[int, tuple[int, int]]:
    """(epoch, offset) by partition: what was committed, or the backfill's cut where that is further."""
    reached = dict(progress.positions)
    if progress.backfill is not None:
        for partition, offset in progress.backfill.cut.items():
            cut = (progress.backfill.epoch, offset)
            reached[partition] = max(cut, reached.get(partition, cut))
    return reached


def _behind(own: Mapping[int, tuple[int, int]] | None, furthest: Mapping[int, tuple[int, int]]) -> int | None:
    if own is None or any(p in own and own[p][0] != epoch for p, (epoch, _) in furthest.items()):
        return None
    return sum(offset - own.get(p, (epoch, -1))[1] for p, (epoch, offset) in furthest.items())
