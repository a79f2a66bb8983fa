from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from deltalake import DeltaTable

from models.errors import InputError, StoreError
from pipelines.dead_letters import (
    WRITES_PER_TIDY,
    DeadLetter,
    Selection,
    read_dead_letters,
    summaries,
    write_dead_letters,
)


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


def test_keys_log_times_and_tombstones_are_kept(tmp_path: Path) -> None:
    whole = replace(letter(1), value=None, key=b"\xffk", log_time_ms=1_600_000_000_000)

    write_dead_letters(tmp_path / "d", [whole])

    assert read_dead_letters(tmp_path / "d") == [whole]


LETTERS = [
    replace(letter(offset, partition, epoch), reason=reason)
    for offset, partition, epoch, reason in (
        (5, 0, 1, "json"),
        (6, 0, 1, "size"),
        (5, 1, 1, "json"),
        (9, 1, 1, "key"),
        (5, 0, 2, "json"),
    )
]


@pytest.mark.parametrize(
    ("selection", "wanted"),
    [
        (Selection(), {0, 1, 2, 3, 4}),
        (Selection(reasons=("json",)), {0, 2, 4}),
        (Selection(reasons=("size", "key"), partitions=(1,)), {3}),
        (Selection(since_offset=6), {1, 3}),
        (Selection(positions=((1, 0, 5), (1, 1, 9))), {0, 3}),
        (Selection(positions=((1, 0, 9),)), set()),
    ],
)
def test_a_selection_takes_what_it_says(tmp_path: Path, selection: Selection, wanted: set[int]) -> None:
    write_dead_letters(tmp_path / "d", LETTERS)

    found = read_dead_letters(tmp_path / "d", selection)
    short = summaries(tmp_path / "d", selection)

    assert found == sorted((LETTERS[n] for n in wanted), key=lambda x: x.position)
    places = zip(*(short[name].to_pylist() for name in ("epoch", "partition", "offset")), strict=True)
    assert set(places) == {x.position for x in found}


def test_a_summary_has_the_size_and_not_the_original(tmp_path: Path) -> None:
    write_dead_letters(tmp_path / "d", [replace(letter(1), value=b"x" * 1000), replace(letter(2), value=None)])

    rows = summaries(tmp_path / "d", Selection())

    assert sorted(rows["size_bytes"].to_pylist()) == [0, 1000]
    assert "value" not in rows.column_names
    assert summaries(tmp_path / "none", Selection()).schema == rows.schema


def test_a_table_whose_files_are_lost_is_named(tmp_path: Path) -> None:
    write_dead_letters(tmp_path / "d", [letter(1)])
    for file in (tmp_path / "d").rglob("*.parquet"):
        file.unlink()

    with pytest.raises(InputError, match=f"{tmp_path / 'd'} cannot be read"):
        read_dead_letters(tmp_path / "d")


def test_many_small_writes_become_few_files_and_no_letter_is_lost(tmp_path: Path) -> None:
    for n in range(WRITES_PER_TIDY + 3):
        assert write_dead_letters(tmp_path / "d", [letter(n), letter(n + 1)]) == (2 if n == 0 else 1)

    assert len(DeltaTable(tmp_path / "d").file_uris()) < 10
    assert [each.offset for each in read_dead_letters(tmp_path / "d")] == list(range(WRITES_PER_TIDY + 4))
