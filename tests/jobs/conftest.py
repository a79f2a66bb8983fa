"""One tiny shop for all tests of the jobs, made by the jobs themselves: ingest, train, encode items."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from uuid import uuid4

import pytest

from jobs.cli import main
from tests.jobs.commands import Said, logs_put_back
from tests.jobs.tiny import Shop, items, purchases, take, tiny_job, write_rows
from tests.kafka_broker import Broker


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


@pytest.fixture
def vql(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """`vql` in this process: exit code and what it printed. Spark commands use the session of the tests."""
    monkeypatch.setenv("COLUMNS", "200")
    # Set, and so put back after the test: --debug sets VQL_DEBUG, and a command may set VQL_STATE.
    for name in ("VQL_DEBUG", "VQL_STATE"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)

    def run(*arguments: object) -> Said:
        monkeypatch.setattr(sys, "argv", ["vql", *map(str, arguments)])
        capsys.readouterr()
        try:
            with logs_put_back():
                main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        printed = capsys.readouterr()
        return Said(code=code, out=printed.out, err=printed.err)

    return run


@pytest.fixture
def topic(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new topic of two partitions, in the cluster that the settings of the environment name."""
    monkeypatch.setenv("VQL_KAFKA_BOOTSTRAP_SERVERS", broker.address)
    return broker.create_topic(f"events-{uuid4().hex}")
