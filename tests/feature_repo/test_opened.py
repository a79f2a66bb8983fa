from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.opened import LOOK_EVERY_S, Opened
from models.errors import CheckpointError
from models.item_table import UNKNOWN
from tests.small import small_checkpoint, write_items


class Clock:
    """Seconds that the test turns."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_items_encoded_meanwhile_are_known_within_seconds(tmp_path: Path) -> None:
    checkpoint, clock = small_checkpoint(tmp_path / "c"), Clock()
    opened = Opened(checkpoint, clock)
    first = opened.fold
    write_items(checkpoint, ["n1", "n2"], "items-00001.parquet")
    assert opened.fold is first

    clock.now_s += LOOK_EVERY_S
    grown = opened.fold

    assert grown.table.lookup(["i1", "n2", "n3"]).tolist() == [1, len(first.table) + 1, UNKNOWN]
    clock.now_s += LOOK_EVERY_S
    assert opened.fold is grown


def test_a_table_that_is_damaged_meanwhile_is_not_used_and_one_that_is_mended_is(tmp_path: Path) -> None:
    checkpoint, clock = small_checkpoint(tmp_path / "c"), Clock()
    opened = Opened(checkpoint, clock)
    first, index = opened.fold, checkpoint.items_path / "items.json"
    sound = index.read_bytes()
    index.write_bytes(b"{")

    clock.now_s += LOOK_EVERY_S
    assert opened.fold is first
    with pytest.raises(CheckpointError, match=r"items\.json is damaged"):
        opened.reload()

    index.write_bytes(sound)
    write_items(checkpoint, ["n1"], "items-00001.parquet")
    clock.now_s += LOOK_EVERY_S
    assert len(opened.fold.table) == len(first.table) + 1


def test_who_must_not_wait_takes_the_table_as_it_was_and_lets_another_look(tmp_path: Path) -> None:
    checkpoint, clock = small_checkpoint(tmp_path / "c"), Clock()
    opened = Opened(checkpoint, clock)
    first = opened.loaded
    write_items(checkpoint, ["n1"], "items-00001.parquet")
    assert not opened.due

    clock.now_s += LOOK_EVERY_S
    assert opened.due
    assert opened.loaded is first
    opened.look()

    assert not opened.due
    assert len(opened.loaded.table) == len(first.table) + 1
