"""The item table: codes of the trained codebook, indices that never move, and whole or absent after a kill."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from jobs.encode_items import encode_items
from jobs.ingest import ingest_items
from models.checkpoint import Checkpoint, open_checkpoint, write_checkpoint
from models.count_kernels import NO_CELL
from models.errors import CheckpointError, InputError
from models.item_table import UNKNOWN, read_index
from models.load import load_ranker
from tests.jobs.tiny import CATEGORIES, ITEMS, Shop, items, write_rows
from tests.small_ranker import COUNTS, scoring_checkpoint

pytestmark = pytest.mark.spark

ITEM_COLUMNS = {"category": "category"}
NEW = [{"item_id": "new-c1", "category": "c1"}, {"item_id": "new-c9", "category": "c9"}]


@pytest.fixture
def checkpoint(own_shop: Shop) -> Checkpoint:
    return open_checkpoint(own_shop.checkpoint)


def grow(spark, log: Path) -> None:
    """Two new items: one of a known category, one of a category that the checkpoint was not trained with."""
    rows = write_rows(log.parent / "grown.parquet", items() + NEW)
    ingest_items(spark, rows, "parquet", ITEM_COLUMNS, log)


def test_row_zero_is_the_unknown_item_and_every_item_has_one_row(checkpoint: Checkpoint) -> None:
    table = checkpoint.fold().table
    assert len(table) == 1 + ITEMS
    assert table.feature_MF[UNKNOWN].tolist() == [0, 0]
    assert sorted(table.index) == sorted(f"i{n}" for n in range(ITEMS))
    assert sorted(table.index.values()) == list(range(1, ITEMS + 1))
    ids, categories = checkpoint.vocabulary("item_id"), checkpoint.vocabulary("category")
    for item_id, row in table.index.items():
        category = f"c{int(item_id[1:]) % CATEGORIES}"
        assert table.feature_MF[row].tolist() == [1 + ids.index(item_id), 1 + categories.index(category)]


def test_a_code_is_the_nearest_codeword_and_a_value_the_models(checkpoint: Checkpoint) -> None:
    table = checkpoint.fold().table
    ranker = load_ranker(checkpoint, table.feature_MF)
    with torch.inference_mode():
        x_Md = ranker.encoder(torch.arange(len(table)))
        key_MGF = ranker.history.keys(x_Md).reshape(len(table), checkpoint.manifest.sizes.groups, -1)
        value_MHD = ranker.history.values(x_Md)
    distance_MGK = (key_MGF[:, :, None] - ranker.history.codebook.codeword_GKF).square().sum(dim=-1)
    chosen = torch.from_numpy(table.code_MG.astype(np.int64))
    assert torch.allclose(distance_MGK.gather(2, chosen[..., None])[..., 0], distance_MGK.amin(dim=-1), atol=1e-5)
    assert len(np.unique(table.code_MG)) > 1
    assert np.allclose(table.value_MHD, value_MHD.numpy(), atol=1e-6)


def test_new_items_are_appended_and_old_ones_stay_where_they_are(spark, own_shop: Shop, checkpoint: Checkpoint) -> None:
    before = checkpoint.fold().table
    assert encode_items(spark, checkpoint, own_shop.log) == (0, 1 + ITEMS)
    assert len(read_index(checkpoint.items_path).segments) == 2
    grow(spark, own_shop.log)

    assert encode_items(spark, checkpoint, own_shop.log) == (2, 3 + ITEMS)

    after = open_checkpoint(checkpoint.path).fold().table
    assert open_checkpoint(checkpoint.path).checkpoint_id == checkpoint.checkpoint_id
    assert {item_id: after.index[item_id] for item_id in before.index} == before.index
    assert np.array_equal(after.code_MG[: 1 + ITEMS], before.code_MG)
    assert np.array_equal(after.value_MHD[: 1 + ITEMS], before.value_MHD)
    known, unknown = after.index["new-c1"], after.index["new-c9"]
    assert after.feature_MF[known].tolist() == [0, 1 + checkpoint.vocabulary("category").index("c1")]
    assert after.feature_MF[unknown].tolist() == [0, 0]
    assert np.allclose(after.value_MHD[unknown], after.value_MHD[UNKNOWN], atol=1e-6)
    assert not np.allclose(after.value_MHD[known], after.value_MHD[UNKNOWN], atol=1e-6)


def test_cells_are_those_of_the_text_also_of_new_items_and_values(spark, own_shop: Shop, tmp_path: Path) -> None:
    made = scoring_checkpoint(tmp_path / "counting", counts=COUNTS)
    shutil.rmtree(made.items_path)
    assert encode_items(spark, made, own_shop.log) == (1 + ITEMS, 1 + ITEMS)
    grow(spark, own_shop.log)
    assert encode_items(spark, made, own_shop.log) == (2, 3 + ITEMS)

    table = open_checkpoint(made.path).fold().table

    assert table.cell_MQ[UNKNOWN].tolist() == [NO_CELL, NO_CELL]
    assert COUNTS.fields == ["category", "item_id"]
    known = {field: made.vocabulary(field) for field in COUNTS.fields}
    for item in items() + NEW:
        rows = [known[field].index(item[field]) + 1 if item[field] in known[field] else 0 for field in COUNTS.fields]
        cells = [COUNTS.cells_of(f, [item[f]], [row]) for f, row in zip(COUNTS.fields, rows, strict=True)]
        wanted = [int(cell[0]) for cell in cells]
        assert table.cell_MQ[table.index[item["item_id"]]].tolist() == wanted
        assert NO_CELL not in wanted


def test_what_a_killed_run_left_is_replaced(spark, own_shop: Shop, checkpoint: Checkpoint) -> None:
    before = checkpoint.fold().table
    grow(spark, own_shop.log)
    left = checkpoint.items_path / "run-00002"
    left.mkdir()
    half = pq.read_table(next(checkpoint.items_path.glob("run-00000/*.parquet"))).slice(0, 3)
    pq.write_table(half, left / "part-00000-half.parquet")
    assert checkpoint.fold().table.index == before.index

    assert encode_items(spark, checkpoint, own_shop.log) == (2, 3 + ITEMS)

    after = checkpoint.fold().table
    assert sorted(after.index) == sorted([*before.index, "new-c1", "new-c9"])
    assert not (left / "part-00000-half.parquet").exists()


def test_the_table_of_another_checkpoint_is_not_added_to(spark, own_shop: Shop, tmp_path: Path) -> None:
    other = scoring_checkpoint(tmp_path / "other")
    (own_shop.checkpoint / "items" / "items.json").write_bytes((other.items_path / "items.json").read_bytes())
    with pytest.raises(CheckpointError, match=f"is the item table of {other.checkpoint_id}"):
        encode_items(spark, open_checkpoint(own_shop.checkpoint), own_shop.log)


def test_a_rival_has_no_codes(own_shop: Shop, checkpoint: Checkpoint, tmp_path: Path) -> None:
    manifest = msgspec.structs.replace(checkpoint.manifest, model="din_50")
    rival = write_checkpoint(tmp_path / "rival", manifest, checkpoint.tensors(), {})
    with pytest.raises(InputError, match="rival is a din_50 model: it has no codes for items"):
        encode_items(None, rival, own_shop.log)


def test_items_without_a_field_of_the_checkpoint_are_refused(spark, own_shop: Shop, checkpoint: Checkpoint) -> None:
    ingest_items(spark, write_rows(own_shop.log.parent / "bare.parquet", items()), "parquet", {}, own_shop.log)
    with pytest.raises(InputError, match=r"items has no columns \['category'\], with which the checkpoint was trained"):
        encode_items(spark, checkpoint, own_shop.log)
