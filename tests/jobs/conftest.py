"""One tiny shop for all tests of the jobs, made by the jobs themselves: ingest, train, encode items."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.jobs.tiny import Shop, items, purchases, take, tiny_job, write_rows


@pytest.fixture(scope="session")
def shop(spark, tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Not to be changed by a test; see `own_shop`."""
    from jobs.encode_items import encode_items
    from jobs.ingest import ingest_items
    from jobs.train import run_training

    folder = tmp_path_factory.mktemp("shop")
    take(spark, purchases(), folder / "log")
    ingest_items(
        spark, write_rows(folder / "items.parquet", items()), "parquet", {"category": "category"}, folder / "log"
    )
    made = run_training(spark, tiny_job(folder / "log"), folder / "work", folder / "checkpoint")
    encode_items(spark, made, folder / "log")
    return Shop(log=folder / "log", checkpoint=made.path)


@pytest.fixture
def own_shop(shop: Shop, tmp_path: Path) -> Shop:
    """A copy to change."""
    shutil.copytree(shop.log, tmp_path / "log")
    shutil.copytree(shop.checkpoint, tmp_path / "checkpoint")
    return Shop(log=tmp_path / "log", checkpoint=tmp_path / "checkpoint")
