"""Which checkpoint is live: what a path names, when it is swapped, and what leaves the old one in place."""

from __future__ import annotations

import gc
import shutil
import weakref
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.store import RowStore
from jobs.encode_items import encode_table
from jobs.scoring import Scorer, load_scorer
from jobs.serving.live import LiveScorer, version_of
from models.checkpoint import open_checkpoint
from models.errors import CheckpointError
from models.item_table import append_segments
from tests.small_ranker import scoring_checkpoint


@pytest.fixture
def names(tmp_path: Path) -> dict[str, str]:
    """The ids of two checkpoints, by the name of their folder in tmp_path."""
    return {
        name: scoring_checkpoint(tmp_path / name, seed).checkpoint_id for name, seed in (("first", 5), ("second", 6))
    }


@pytest.fixture
def rows(tmp_path: Path, names) -> RowStore:
    """Holds positions of both checkpoints."""
    rows = StoreHandle(state=tmp_path, redis=None).open()
    for checkpoint_id in names.values():
        rows.commit_positions(checkpoint_id, 1, {1: 0})
    return rows


@pytest.fixture
def load(rows: RowStore):

    def load(path: Path) -> Scorer:
        checkpoint = open_checkpoint(path)
        fold = checkpoint.fold()
        return load_scorer(checkpoint, fold, Reader(rows, Opened(checkpoint)))

    return load


def test_a_folder_a_link_and_a_file_name_the_same_checkpoint(tmp_path: Path, names):
    (tmp_path / "link").symlink_to("first")
    (tmp_path / "relative").write_text("first\n")
    (tmp_path / "absolute").write_text(str(tmp_path / "first"))
    (tmp_path / "link-to-file").symlink_to("relative")
    versions = {version_of(tmp_path / name) for name in ("first", "link", "relative", "absolute", "link-to-file")}
    assert len(versions) == 1
    assert versions.pop()[0] == (tmp_path / "first").resolve()


@pytest.mark.parametrize("text", [b"", b"nowhere", b"first\nsecond", b"\xff\xfe", b"\0"])
def test_a_file_that_names_no_folder_is_refused(tmp_path: Path, names, text: bytes):
    (tmp_path / "live").write_bytes(text)
    with pytest.raises(CheckpointError, match="live"):
        version_of(tmp_path / "live")


def test_it_swaps_only_when_the_name_or_what_it_names_has_changed(tmp_path: Path, names, load):
    (tmp_path / "live").write_text("first")
    live = LiveScorer(tmp_path / "live", load)
    first = live.scorer
    assert not live.look()
    assert live.scorer is first
    (tmp_path / "live").write_text("second")
    assert live.look()
    assert live.scorer.checkpoint_id == names["second"]
    shutil.rmtree(tmp_path / "second")
    shutil.copytree(tmp_path / "first", tmp_path / "second")
    assert live.look()
    assert live.scorer.checkpoint_id == names["first"]


def test_a_scorer_that_was_swapped_out_is_let_go_with_its_threads(tmp_path: Path, names, load):
    (tmp_path / "live").write_text("first")
    live = LiveScorer(tmp_path / "live", load)
    reader = weakref.ref(live.scorer.reader)
    (tmp_path / "live").write_text("second")
    assert live.look()
    gc.collect()
    assert reader() is None


def test_an_item_table_that_has_grown_is_seen(tmp_path: Path, names, load):
    live = LiveScorer(tmp_path / "first", load)
    items = len(live.scorer.table)
    segment = tmp_path / "first" / "items" / "more.parquet"
    pq.write_table(encode_table(live.scorer.ranker, ["fresh"], np.array([[0, 1]])), segment)
    append_segments(segment.parent, names["first"], [segment])
    assert live.look()
    assert live.scorer.table.lookup(["fresh"]).tolist() == [items]
    assert live.scorer.checkpoint_id == names["first"]


def test_what_cannot_be_used_leaves_the_old_one_and_is_tried_again(tmp_path: Path, names, rows, load):
    (tmp_path / "live").write_text("first")
    rows.delete_checkpoint(names["second"])
    live = LiveScorer(tmp_path / "live", load)
    (tmp_path / "live").write_text("second")
    manifest = (tmp_path / "second" / "manifest.json").read_bytes()
    (tmp_path / "second" / "manifest.json").write_bytes(manifest[:-5])
    assert not live.look()
    assert "is damaged" in str(live.problem)
    (tmp_path / "second" / "manifest.json").write_bytes(manifest)
    assert not live.look()
    assert "run vql backfill" in str(live.problem)
    assert live.scorer.checkpoint_id == names["first"]
    rows.commit_positions(names["second"], 1, {1: 0})
    assert live.look()
    assert (live.scorer.checkpoint_id, live.problem) == (names["second"], None)


def test_files_that_change_while_they_are_loaded_are_loaded_again(tmp_path: Path, names, load):
    (tmp_path / "live").write_text("first")
    turned = []

    def load_and_turn(path: Path) -> Scorer:
        scorer = load(path)
        if path.name == "second" and not turned:
            turned.append(path)
            (tmp_path / "live").write_text("first")
        return scorer

    live = LiveScorer(tmp_path / "live", load_and_turn)
    (tmp_path / "live").write_text("second")
    assert not live.look()
    assert live.scorer.checkpoint_id == names["first"]
