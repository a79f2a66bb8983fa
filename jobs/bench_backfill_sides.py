"""The sides of the benchmark of the backfill: the floor, a task's fold, and the naive way; and the log they read.

The floor is the plain numba fold: the records of one user after another, in memory and looked up already, become a
cache each. A task's fold begins with strings in Arrow batches and ends with the bytes of rows. The naive way is
Spark's grouped apply in pandas, a call for each user, with the same functions of `models` inside; it stores nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from zlib import crc32

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from deltalake import DeltaTable, write_deltalake
from pyspark.sql import DataFrame

from feature_repo.opened import Opened
from feature_repo.store import whole_puts
from jobs.backfill_task import ROWS_PER_PUT, fold_users
from jobs.bench_load import ACTIONS, ITEMS, random_history
from jobs.spark import EVENTS_PER_BATCH
from models.cache import empty, fold
from models.checkpoint import Checkpoint, open_checkpoint
from models.row import Fold, advance, encode_row, new_row
from models.wire import Stamp, pack_recent, recent_actions, recent_times

EPOCH = 1
EVENTS_PER_FILE = 1_000_000
END_MS = 1_700_000_000_000
LOG = pa.schema(
    [
        *((name, pa.int32()) for name in ("epoch", "partition")),
        ("offset", pa.int64()),
        *((name, pa.string()) for name in ("event_id", "user_id", "item_id", "action")),
        ("event_time_ms", pa.int64()),
        ("weight", pa.float64()),
        ("log_time_ms", pa.int64()),
        ("value", pa.binary()),
    ]
)
_ITEM_IDS = pa.array(["", *(f"item-{n}" for n in range(1, ITEMS + 1))])


def random_records(users: int, length: int) -> np.ndarray:
    """The records of `users` users of this length, one after another."""
    rng = np.random.default_rng(0)
    return np.concatenate([random_history(rng, length, END_MS) for _ in range(users)])


def plain_fold(using: Fold, records: np.ndarray, length: int) -> None:
    """The floor."""
    nobody = empty(using.spec)
    for start in range(0, len(records), length):
        fold(nobody, using.encode(records[start : start + length]))


def arrow_batches(records: np.ndarray, length: int) -> list[pa.RecordBatch]:
    """The same events as a task is given them."""
    user_N, offset_N = np.arange(len(records)) // length, np.arange(len(records))
    table = pa.record_batch(
        {
            "user_id": _user_ids(user_N),
            "item_id": _ITEM_IDS.take(records["item"]),
            "action": pa.array(ACTIONS).take(recent_actions(records)),
            "event_time_ms": recent_times(records),
            "weight": records["weight"].astype(np.float64),
            "partition": (user_N % 4).astype(np.int32),
            "offset": offset_N,
            "event_hash": offset_N,
        }
    )
    return [table.slice(start, EVENTS_PER_BATCH) for start in range(0, len(records), EVENTS_PER_BATCH)]


def task_fold(opened: Opened, batches: list[pa.RecordBatch]) -> None:
    """What a task does but for the store: rows, and the puts that carry them."""
    rows = fold_users(batches, opened, EPOCH)
    while chunk := list(islice(rows, ROWS_PER_PUT)):
        whole_puts(*zip(*chunk, strict=True))


def write_log(path: Path, users: int, length: int, partitions: int = 4, heavy: int = 0) -> None:
    """A log whose users take turns, each with `length` random events; and one more user with `heavy` of them."""
    table = DeltaTable.create(path, LOG, partition_by=["partition"])
    # delta-rs refuses properties that it does not know when it creates a table, but not afterwards.
    properties = {"vql.partitions": str(partitions), "vql.epoch": str(EPOCH)}
    table.alter.set_table_properties(properties, raise_if_not_exists=False)
    rng = np.random.default_rng(1)
    for partition in range(partitions):
        user_U = np.arange(partition, users, partitions)
        turns_U = np.tile(user_U, length)
        if heavy and partition == 0:
            turns_U = rng.permutation(np.concatenate([turns_U, np.full(heavy, users)]))
        for start in range(0, len(turns_U), EVENTS_PER_FILE):
            events = _events(rng, turns_U[start : start + EVENTS_PER_FILE], partition, start)
            write_deltalake(path, events, mode="append")


def _events(rng: np.random.Generator, user_N: np.ndarray, partition: int, first_offset: int) -> pa.Table:
    count = len(user_N)
    offset_N = first_offset + np.arange(count)
    columns = {
        "epoch": np.full(count, EPOCH, np.int32),
        "partition": np.full(count, partition, np.int32),
        "offset": offset_N,
        "event_id": pc.binary_join_element_wise(pa.array(offset_N).cast(pa.string()), str(partition), "-"),
        "user_id": _user_ids(user_N),
        # As with a shop's items, few are met often.
        "item_id": _ITEM_IDS.take(1 + (ITEMS * rng.random(count) ** 3).astype(np.int64)),
        "action": pa.array(ACTIONS).take(rng.integers(0, len(ACTIONS), count)),
        "event_time_ms": END_MS - 10**9 + offset_N,
        "weight": np.ones(count),
        "log_time_ms": pa.nulls(count, pa.int64()),
        "value": pa.array([b"{}"]).take(np.zeros(count, np.int64)),
    }
    return pa.table(columns, LOG)


def _user_ids(user_N: np.ndarray) -> pa.Array:
    ids, at_N = np.unique(user_N, return_inverse=True)
    return pa.array([user_name(n) for n in ids.tolist()]).take(at_N)


def user_name(user: int) -> str:
    return f"user-{user:07d}"


def naive_rows(wanted: DataFrame, checkpoint: Checkpoint) -> DataFrame:
    """(user id, checksum of the row's recent part, events) of every user, by a grouped apply over these events."""
    path = checkpoint.path

    def of_one_user(events: pd.DataFrame) -> pd.DataFrame:
        opened, using = _opened(path)
        events = events.sort_values("offset")
        records = pack_recent(
            events["offset"].to_numpy(),
            events["event_time_ms"].to_numpy(),
            opened.action_index(events["action"].tolist()),
            using.table.lookup(events["item_id"].tolist()),
            events["weight"].to_numpy(),
            events["event_hash"].to_numpy(),
        )
        position = Stamp(epoch=EPOCH, partition=int(events["partition"].iloc[0]), offset=-1)
        row, _ = advance(new_row(using.spec, EPOCH, position.partition), records, position, using)
        made = {"user_id": events["user_id"].iloc[0], "row": crc32(encode_row(row).recent), "events": len(events)}
        return pd.DataFrame([made])

    return wanted.groupBy("user_id").applyInPandas(of_one_user, "user_id string, row long, events long")


@lru_cache(maxsize=1)
def _opened(path: Path) -> tuple[Checkpoint, Fold]:
    checkpoint = open_checkpoint(path)
    return checkpoint, checkpoint.fold()


def sampled(users: int, count: int) -> Iterator[str]:
    """So many of the users, evenly."""
    return (user_name(n) for n in range(0, users, max(1, users // count)))
