"""Small files in the formats that the data sets are published in, and what becomes of them."""

from __future__ import annotations

from pathlib import Path

from jobs.datasets import DATASETS
from jobs.datasets.dataset import Prepared, prepare
from jobs.ingest import NewLog
from tests.jobs.tiny import logged


def write_files(folder: Path, files: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def prepared(spark, name: str, folder: Path | None, log: Path, where: str = "true") -> Prepared:
    return prepare(spark, DATASETS[name], folder, log, where, NewLog(partitions=2))


def events(log: Path) -> dict[tuple, tuple]:
    """(user, item, time) to (event id, action)."""
    return {
        (row["user_id"], row["item_id"], row["event_time_ms"]): (row["event_id"], row["action"]) for row in logged(log)
    }


def items(log: Path) -> dict[str, dict]:
    return {row.pop("item_id"): row for row in logged(log, "items")}
