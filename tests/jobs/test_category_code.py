"""A category as the code of a group goes the way of an event: train, encode-items, backfill, stream, inspect."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.ingest import ingest_items
from jobs.parity import compare_rows
from models.checkpoint import open_checkpoint
from models.item_table import UNKNOWN
from tests.jobs.tiny import CATEGORIES, TRAIN_OPTIONS, USERS, Shop, items, purchases, write_rows
from tests.small import START_MS

NEW = [{"item_id": "new-c1", "category": "c1"}, {"item_id": "new-c9", "category": "c9"}]


@pytest.mark.spark
@pytest.mark.beam
def test_the_way_of_an_event(vql, spark, own_shop: Shop, tmp_path: Path) -> None:
    log, path, state = own_shop.log, tmp_path / "category", tmp_path / "state"
    train = ["train", "--log", log, "--checkpoint", path, "--work", tmp_path / "work", *TRAIN_OPTIONS, "--epochs", "4"]
    said = vql(*train, "--category-code", "category")
    assert said.code == 0, said.err
    of = ["--checkpoint", path, "--log", log]
    assert vql("encode-items", *of).code == 0
    checkpoint = open_checkpoint(path)

    # Of a category that the checkpoint knows, of one that it does not know, and an item of which nothing is known.
    ingest_items(spark, write_rows(tmp_path / "grown.parquet", items() + NEW), "parquet", {"category": "category"}, log)
    assert "2 items added" in vql("encode-items", *of).out
    table = checkpoint.fold().table
    rows = dict(zip(checkpoint.vocabulary("category"), range(1, CATEGORIES + 1), strict=True))
    for item in items() + NEW:
        assert table.code_MG[table.index[item["item_id"]], 0] == rows.get(item["category"], 0)
    assert table.code_MG[UNKNOWN, 0] == 0
    assert len(np.unique(table.code_MG[:, 1])) > CATEGORIES

    # The rows of the past by backfill, of what is new by the stream.
    assert vql("backfill", *of, "--state", state).code == 0
    more = [
        row | {"event_id": f"n{n}", "item_id": item, "event_time_ms": START_MS + 10**9 + n}
        for n, (row, item) in enumerate(zip(purchases(range(1)), [*table.index, "never"] * 9, strict=False))
    ]
    assert vql("ingest", "--input", write_rows(tmp_path / "more.parquet", more), "--log", log).code == 0
    assert vql("stream", *of, "--state", state, "--until", "end").code == 0
    found = compare_rows(Reader(StoreHandle(state=state).open(), Opened(checkpoint)), log)
    assert (found.users, found.conserved) == (USERS, True)
    assert found.max_abs_error < 1e-4

    shown = vql("inspect", path)
    assert "code of group 0" in shown.out
    assert checkpoint.manifest.diagnostics.usage[0].used == CATEGORIES
