from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from models.errors import StoreError
from pipelines.dead_letters import DeadLetter, read_dead_letters, write_dead_letters


def letter(offset: int, partition: int = 0, epoch: int = 1) -> DeadLetter:
    return DeadLetter(
        epoch=epoch, partition=partition, offset=offset, reason="json", detail="x'\"\n", value=b"\x00\xff%d" % offset
    )


def test_letters_are_read_back_whole(tmp_path: Path) -> None:
    letters = [letter(5), letter(1, partition=1), letter(0, partition=1, epoch=2)]

    assert write_dead_letters(tmp_path / "d", letters) == 3
    assert read_dead_letters(tmp_path / "d") == letters


def test_no_letters_leave_no_table(tmp_path: Path) -> None:
    assert write_dead_letters(tmp_path / "d", []) == 0
    assert not (tmp_path / "d").exists()
    assert read_dead_letters(tmp_path / "d") == []


def test_a_letter_written_again_is_there_once(tmp_path: Path) -> None:
    write_dead_letters(tmp_path / "d", [letter(1), letter(2)])

    assert write_dead_letters(tmp_path / "d", [letter(2), letter(3), letter(3)]) == 1
    assert read_dead_letters(tmp_path / "d") == [letter(1), letter(2), letter(3)]


def test_a_stream_that_starts_earlier_later_loses_none_of_its_letters(tmp_path: Path) -> None:
    write_dead_letters(tmp_path / "d", [letter(100)])
    write_dead_letters(tmp_path / "d", [letter(3), letter(100)])

    assert read_dead_letters(tmp_path / "d") == [letter(3), letter(100)]


def test_writers_at_once_leave_each_letter_once(tmp_path: Path) -> None:
    shares = [[letter(offset) for offset in range(start, start + 10)] for start in (0, 5, 8, 0)]

    with ThreadPoolExecutor(4) as pool:
        new = list(pool.map(lambda share: write_dead_letters(tmp_path / "d", share), shares))

    assert read_dead_letters(tmp_path / "d") == [letter(offset) for offset in range(18)]
    assert sum(new) == 18


def test_a_folder_that_cannot_be_a_table_is_named(tmp_path: Path) -> None:
    (tmp_path / "d").write_text("a file")

    with pytest.raises(StoreError, match=str(tmp_path / "d")):
        write_dead_letters(tmp_path / "d", [letter(1)])
