"""A small checkpoint that can score: an untrained ranker with a started codebook, and its item table."""

from __future__ import annotations

from pathlib import Path

import pyarrow.parquet as pq
import torch

from jobs.encode_items import encode_table
from models.checkpoint import OTHER_ACTION, Checkpoint, Manifest, Sizes, write_checkpoint
from models.counts import CountPlan
from models.item_table import append_segments
from models.ranker import Ranker, Shape, VqlHistory
from tests.small import HOUR_MS
from tests.small_examples import CATEGORIES, ITEMS, SIZES, cell_table, feature_table

ACTIONS = [OTHER_ACTION, "purchase", "view"]
HALF_LIVES: list[list[float | None]] = [[float(HOUR_MS)], [24.0 * HOUR_MS], [168.0 * HOUR_MS], [None]]


COUNTS = CountPlan(fields=["category", "item_id"], half_life_ms=[24.0 * HOUR_MS, None])


def scoring_checkpoint(path: Path, seed: int = 5, counts: CountPlan | None = None, sizes: Sizes = SIZES) -> Checkpoint:
    """Items i1 to i40 of four categories; random parameters, so every part of a score counts."""
    torch.manual_seed(seed)
    shape = Shape(
        sizes=sizes,
        half_life_ms=HALF_LIVES,
        actions=len(ACTIONS),
        field_rows=[ITEMS + 1, CATEGORIES + 1],
        counting=counts,
    )
    history, cells = VqlHistory(shape), None if counts is None else cell_table(counts)
    ranker = Ranker(shape, torch.from_numpy(feature_table()), history, cells).eval()
    torch.nn.init.normal_(history.action_value_AHD)
    keys, _ = history.grouped_keys(ranker.encoder, torch.arange(ITEMS + 1))
    history.codebook.start(keys, torch.Generator().manual_seed(0))
    item_ids = [f"i{n}" for n in range(1, ITEMS + 1)]
    manifest = Manifest(
        model="vql",
        sizes=sizes,
        half_life_ms=HALF_LIVES,
        actions=ACTIONS,
        fields=["item_id", "category"],
        training={},
        metrics={},
        files={},
        counts=counts,
    )
    tensors = {name: tensor.numpy() for name, tensor in ranker.state_dict().items()}
    vocabularies = {"item_id": item_ids, "category": [f"c{n}" for n in range(1, CATEGORIES + 1)]}
    checkpoint = write_checkpoint(path, manifest, tensors, vocabularies)
    checkpoint.items_path.mkdir()
    segment = checkpoint.items_path / "all.parquet"
    pq.write_table(encode_table(ranker, ["", *item_ids], feature_table(), cells), segment)
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [segment])
    return checkpoint
