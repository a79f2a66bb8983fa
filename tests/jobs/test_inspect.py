"""`vql inspect` shows what a checkpoint holds, and draws it."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.inspection import largest_row_bytes
from models.checkpoint import open_checkpoint
from models.row import advance, encode_row, new_row
from models.wire import Stamp
from tests.jobs.commands import assert_one_line
from tests.jobs.tiny import SIZES, Shop
from tests.pipelines.small_log import recent_of
from tests.small import random_events


@pytest.mark.spark
def test_a_checkpoint_is_shown_with_its_diagnostics_and_drawn(vql, shop: Shop, tmp_path: Path) -> None:
    said = vql("inspect", shop.checkpoint, "--plot", tmp_path / "plot.png")

    checkpoint = open_checkpoint(shop.checkpoint)
    found = checkpoint.manifest.diagnostics
    assert found is not None
    assert len(found.usage) == len(found.key_error) == SIZES.groups
    assert said.code == 0
    for text in (checkpoint.checkpoint_id, "category", f"{found.attention[0].mean:.4f}", "100,000"):
        assert text in said.out
    assert (tmp_path / "plot.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.spark
def test_no_row_is_larger_than_the_largest(shop: Shop) -> None:
    checkpoint = open_checkpoint(shop.checkpoint)
    using, at = checkpoint.fold(), Stamp(epoch=1, partition=0, offset=-1)
    events = recent_of(checkpoint, random_events(2000, users=1), range(2000))
    for length in (1, 50, 2000):
        row, _ = advance(new_row(using.spec, 1, 0), events[:length], at, using)
        assert encode_row(row).size_bytes <= largest_row_bytes(checkpoint)


def test_what_is_no_checkpoint_is_one_line(vql, tmp_path: Path) -> None:
    assert_one_line(vql("inspect", tmp_path / "nothing"), 3, "nothing")
