"""The item table: indices that never change, item 0 for what is not known, and damage that is named."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from models.checkpoint import Checkpoint
from models.errors import CheckpointError
from models.item_table import UNKNOWN, ItemTable, append_segments, read_index
from tests.small import ITEMS, small_checkpoint, write_items

FIRST = "items-00000.parquet"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint")


def load(checkpoint: Checkpoint) -> ItemTable:
    return checkpoint.fold().table


def test_items_are_found_by_id_and_unknown_ones_are_item_zero(checkpoint):
    table = load(checkpoint)
    assert len(table) == ITEMS + 1
    assert table.lookup(["i1", "nobody knows", "i50", "", "i1"]).tolist() == [1, UNKNOWN, 50, UNKNOWN, 1]
    assert UNKNOWN == 0
    assert table.lookup([]).dtype == np.int64


def test_codes_values_and_features_keep_their_shapes_and_types(checkpoint):
    table = load(checkpoint)
    assert (table.code_MG.shape, table.code_MG.dtype) == ((ITEMS + 1, 2), np.uint16)
    assert (table.value_MHD.shape, table.value_MHD.dtype) == ((ITEMS + 1, 4, 3), np.float32)
    assert table.feature_MF[:, 0].tolist() == list(range(ITEMS + 1))
    assert table.action_value_AHD.shape == (3, 4, 3)
    wanted = np.random.default_rng(0).integers(0, 8, (ITEMS + 1, 2))
    np.testing.assert_array_equal(table.code_MG, wanted)


def test_appending_keeps_every_index_code_and_value(checkpoint):
    before = load(checkpoint)
    write_items(checkpoint, ["new1", "new2"], "items-00001.parquet", seed=1)
    write_items(checkpoint, ["new3"], "items-00002.parquet", seed=2)
    after = load(checkpoint)
    assert {item: after.index[item] for item in before.index} == before.index
    np.testing.assert_array_equal(after.code_MG[: len(before)], before.code_MG)
    np.testing.assert_array_equal(after.value_MHD[: len(before)], before.value_MHD)
    assert after.lookup(["new1", "new2", "new3", "i7", "new4"]).tolist() == [51, 52, 53, 7, UNKNOWN]


def test_a_segment_that_is_already_named_is_not_added_again(checkpoint):
    before = read_index(checkpoint.items_path)
    files = [checkpoint.items_path / FIRST]
    assert append_segments(checkpoint.items_path, checkpoint.checkpoint_id, files) == before
    assert [(s.name, s.items) for s in before.segments] == [(FIRST, ITEMS + 1)]


def test_a_segment_from_before_items_had_vectors_is_read(checkpoint):
    before, path = load(checkpoint), checkpoint.items_path / FIRST
    pq.write_table(pq.read_table(path).drop_columns(["vector"]), path)
    (checkpoint.items_path / "items.json").unlink()
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [path])
    write_items(checkpoint, ["new"], "items-00001.parquet", seed=1)
    after = load(checkpoint)
    assert after.vector_Md is before.vector_Md is None
    np.testing.assert_array_equal(after.value_MHD[: len(before)], before.value_MHD)
    assert after.lookup(["new"]).tolist() == [ITEMS + 1]


def test_a_segment_that_no_index_names_is_not_read(checkpoint):
    shutil.copy(checkpoint.items_path / FIRST, checkpoint.items_path / "items-00001.parquet")
    assert len(load(checkpoint)) == ITEMS + 1


def test_a_segment_in_a_folder_below_is_found(checkpoint):
    (checkpoint.items_path / "batch").mkdir()
    write_items(checkpoint, ["deep"], "batch/items-00001.parquet")
    assert load(checkpoint).lookup(["deep"]).tolist() == [51]


def test_an_item_that_a_later_segment_repeats_keeps_its_first_index(checkpoint):
    write_items(checkpoint, ["i3", "new"], "items-00001.parquet", seed=1)
    assert load(checkpoint).lookup(["i3", "new"]).tolist() == [3, 52]


def test_a_table_that_was_never_made_says_how_to_make_it(checkpoint):
    shutil.rmtree(checkpoint.items_path)
    with pytest.raises(CheckpointError, match="holds no item table; run: vql encode-items"):
        load(checkpoint)


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"checkpoint_id": 3, "segments": []}', b'{"a": 1}', b"\xff"])
def test_a_damaged_index_is_named(checkpoint, damage):
    (checkpoint.items_path / "items.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match=r"items\.json is damaged"):
        load(checkpoint)


def test_an_index_that_is_not_utf8_is_named(checkpoint):
    path = checkpoint.items_path / "items.json"
    path.write_bytes(path.read_bytes().replace(b"items-", b"items\xff"))
    with pytest.raises(CheckpointError, match=r"items\.json is damaged"):
        load(checkpoint)


def test_a_missing_segment_is_named(checkpoint):
    (checkpoint.items_path / FIRST).unlink()
    with pytest.raises(CheckpointError, match=f"{FIRST} is missing; restore it from a copy"):
        load(checkpoint)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.999])
def test_a_damaged_or_cut_segment_is_named(checkpoint, part):
    path = checkpoint.items_path / FIRST
    whole = path.read_bytes()
    at = int(part * len(whole))
    for damaged in (whole[:at], whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], whole + b"x"):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=f"{FIRST} does not match its hash"):
            load(checkpoint)


def test_the_table_of_another_checkpoint_is_refused(checkpoint, tmp_path):
    other = small_checkpoint(tmp_path / "other", seed=1)
    shutil.rmtree(checkpoint.items_path)
    shutil.copytree(other.items_path, checkpoint.items_path)
    with pytest.raises(CheckpointError, match=f"is the item table of {other.checkpoint_id}"):
        load(checkpoint)


def test_segments_are_never_appended_to_the_table_of_another_checkpoint(checkpoint, tmp_path):
    other = small_checkpoint(tmp_path / "other", seed=1)
    before = (checkpoint.items_path / "items.json").read_bytes()
    shutil.copy(other.items_path / FIRST, checkpoint.items_path / "items-00001.parquet")
    with pytest.raises(CheckpointError):
        append_segments(checkpoint.items_path, other.checkpoint_id, [checkpoint.items_path / "items-00001.parquet"])
    assert (checkpoint.items_path / "items.json").read_bytes() == before


def test_a_table_without_segments_is_a_checkpoint_error(checkpoint):
    shutil.rmtree(checkpoint.items_path)
    checkpoint.items_path.mkdir()
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [])
    with pytest.raises(CheckpointError):
        load(checkpoint)
