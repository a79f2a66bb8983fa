from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.table import Table

from jobs.letter_tables import counts_table, newest_table
from pipelines.dead_letters import DeadLetter, Selection, summaries, write_dead_letters
from pipelines.replay import Replay


def shown(table: Table) -> list[str]:
    console = Console(file=io.StringIO(), width=200)
    console.print(table)
    return console.file.getvalue().splitlines()


def rows(path: Path):
    kinds = [("json", 0), ("json", 0), ("json", 1), ("[b]odd", 1)]
    letters = [
        DeadLetter(
            epoch=1, partition=partition, offset=n, reason=reason, detail="\x1b[2J" + "long " * 40, value=b"x" * 1500
        )
        for n, (reason, partition) in enumerate(kinds)
    ]
    write_dead_letters(path, letters)
    return summaries(path, Selection())


def test_letters_are_counted_by_reason_and_partition_the_most_frequent_first(tmp_path: Path) -> None:
    lines = shown(counts_table(rows(tmp_path / "d")))

    cells = [line.strip("│").replace("│", " ").split() for line in lines if line.startswith("│")]
    assert cells == [["2", "json", "0", "1"], ["1", "[b]odd", "1", "3"], ["1", "json", "1", "2"]]


def test_the_newest_show_where_they_are_and_whether_they_were_replayed(tmp_path: Path) -> None:
    found = sorted(rows(tmp_path / "d").to_pylist(), key=lambda row: row["offset"])[:2]
    replays = {(1, 0, 1): Replay(claim="c", claimed_ms=0, topic="t", new_offset=77)}

    lines = shown(newest_table(found, 4, replays))

    assert "the newest 2 of 4" in lines[0]
    (first,) = [line for line in lines if "1:0:0" in line]
    (second,) = [line for line in lines if "1:0:1" in line]
    assert "1,500" in first
    assert "unknown" in first
    assert "at offset" not in first
    assert "at offset 77" in second
    assert "\\x1b[2J" in first
    assert all(line.isprintable() for line in lines)
