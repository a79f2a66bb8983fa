"""Dead letters as tables for a terminal: how many of which kind, and the newest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from rich.table import Table
from rich.text import Text

from jobs.printable import escaped, plain, time_words

if TYPE_CHECKING:
    import pyarrow as pa

DETAIL_LETTERS = 80
Position = tuple[int, int, int]


class Replayed(Protocol):
    """What became of a replay, in words."""

    @property
    def words(self) -> str: ...


def counts_table(rows: pa.Table) -> Table:
    """The letters (`dead_letters.summaries`) by reason and partition, the most frequent first."""
    table = Table(title="dead letters by reason and partition", title_justify="left")
    for name in ("letters", "reason", "partition", "last offset"):
        table.add_column(name, justify="left" if name == "reason" else "right")
    counts = rows.group_by(["reason", "partition"]).aggregate([("size_bytes", "count"), ("offset", "max")])
    order = [("size_bytes_count", "descending"), ("reason", "ascending"), ("partition", "ascending")]
    for row in counts.sort_by(order).to_pylist():
        letters, last = f"{row['size_bytes_count']:,}", str(row["offset_max"])
        table.add_row(letters, plain(row["reason"]), str(row["partition"]), last)
    return table


def newest_table(rows: Sequence[Mapping[str, Any]], total: int, replays: Mapping[Position, Replayed]) -> Table:
    """A line for each of these letters, of `total` ones."""
    table = Table(title=f"the newest {len(rows):,} of {total:,}", title_justify="left")
    for name in ("position", "log time", "reason", "bytes", "replayed", "detail"):
        table.add_column(name, justify="right" if name == "bytes" else "left", no_wrap=name == "position")
    for row in rows:
        replay, detail = replays.get(place_of(row)), escaped(row["detail"])
        table.add_row(
            ":".join(map(str, place_of(row))),
            time_words(row["log_time_ms"]),
            plain(row["reason"]),
            f"{row['size_bytes']:,}",
            "" if replay is None else replay.words,
            Text(detail if len(detail) <= DETAIL_LETTERS else detail[: DETAIL_LETTERS - 1] + "…"),
        )
    return table


def place_of(row: Mapping[str, Any]) -> Position:
    return (row["epoch"], row["partition"], row["offset"])
