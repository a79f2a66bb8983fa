"""A tiny shop: users who buy two things a day, mostly of the category they like. Enough for every job in seconds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from deltalake import DeltaTable

from jobs.ingest import EventSource, IngestReport, NewLog, ingest
from jobs.train import DAY_MS, TrainJob
from models.checkpoint import Sizes
from tests.small import START_MS

USERS, DAYS, ITEMS, CATEGORIES, PARTITIONS = 30, 12, 24, 3, 2
# What the command line makes of TRAIN_OPTIONS, with over fifty steps: a state is saved on the way.
SIZES = Sizes(heads=4, groups=2, codewords=8, window=4, newest=3)
EPOCHS = 8
TRAIN_OPTIONS = [
    "--field",
    "category",
    "--groups",
    2,
    "--codewords",
    8,
    "--window",
    4,
    "--newest",
    3,
    "--epochs",
    EPOCHS,
    "--no-counts",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class Shop:
    """The folders of a shop: its log, and the checkpoint with the item table that was trained on it."""

    log: Path
    checkpoint: Path


def purchases(days: range = range(DAYS), *, users: int = USERS) -> list[dict]:
    """The events of these days, each the same in every call."""
    rows = []
    for user in range(users):
        for day in days:
            rng = np.random.default_rng([user, day])
            for basket_item in range(2):
                liked = user % CATEGORIES if rng.random() < 0.9 else int(rng.integers(CATEGORIES))
                item = int(rng.integers(ITEMS // CATEGORIES)) * CATEGORIES + liked
                rows.append(
                    {
                        "event_id": f"u{user}-{day}-{basket_item}",
                        "user_id": f"u{user}",
                        "item_id": f"i{item}",
                        "action": "purchase" if basket_item else "view",
                        "event_time_ms": START_MS + day * int(DAY_MS) + user * 1000,
                        "weight": 1.0,
                    }
                )
    return rows


def items() -> list[dict]:
    return [{"item_id": f"i{i}", "category": f"c{i % CATEGORIES}"} for i in range(ITEMS)]


def write_rows(path: Path, rows: Sequence[Mapping]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(list(rows)), path)
    return path


def source(path: Path, **columns: str) -> EventSource:
    return EventSource(path=path, format="csv" if path.suffix == ".csv" else "parquet", columns=columns)


def take(spark, rows: Sequence[Mapping], log: Path, partitions: int = PARTITIONS) -> IngestReport:
    """Ingest these rows."""
    return ingest(
        spark, source(write_rows(log.parent / f"{log.name}.parquet", rows)), log, NewLog(partitions=partitions)
    )


def logged(log: Path, table: str = "events") -> list[dict]:
    """The rows of a table of the log; events by partition and offset."""
    rows = DeltaTable(log / table).to_pyarrow_table().to_pylist()
    return sorted(rows, key=lambda row: (row.get("partition", 0), row.get("offset", 0)))


def tiny_job(log: Path, **changes) -> TrainJob:
    """A training of some ninety steps."""
    settings = {"log": str(log), "fields": ("category",), "sizes": SIZES, "epochs": EPOCHS}
    return TrainJob(**(settings | changes))
