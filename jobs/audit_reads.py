"""What is audited: reads that rankers logged, and rows as the store holds them now. Both as the same columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from feature_repo.handle import StoreHandle
from jobs.spark import read_delta
from models.errors import InputError, WireError
from models.row import RowBytes
from models.user_hash import key_id, user_hash_key
from models.wire import FOLDED_MAGIC, RECENT_MAGIC, Stamp, read_header

USERS_PER_READ = 200
# A read: of whom, when, what it found, and the scores that were made of it. revision: of either part, if one is sound.
READ = (
    "user_id string, read_ms long, history string, epoch long, partition long, offset long, revision long, "
    "folded binary, recent binary, asked_ms long, item array<long>, score array<float>"
)
COLUMNS = [column.split()[0] for column in READ.split(", ")]
_STORED = pa.schema(
    [
        ("user_id", pa.string()),
        ("read_ms", pa.int64()),
        ("history", pa.string()),
        *((name, pa.int64()) for name in ("epoch", "partition", "offset", "revision")),
        ("folded", pa.binary()),
        ("recent", pa.binary()),
        ("asked_ms", pa.int64()),
        ("item", pa.list_(pa.int64())),
        ("score", pa.list_(pa.float32())),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedReads:
    """Which reads of a read log, and the file of the key that its users are hashed with."""

    path: Path
    key_file: Path | None
    since_ms: int
    until_ms: int


def logged_reads(spark: SparkSession, part: LoggedReads, checkpoint_id: str) -> DataFrame:
    """The reads of a checkpoint, with user_hash in place of user_id; those of another key are left out.

    Raises InputError when there is no read log, or none of these in it, and for no key.
    """
    since_ms, until_ms = part.since_ms, part.until_ms
    reads = read_delta(spark, part.path).where(F.col("checkpoint_id") == checkpoint_id)
    reads = reads.where(F.col("key_id") == key_id(user_hash_key(part.key_file)))
    # Days are folders.
    days = (F.col("day") >= day_of(since_ms)) & (F.col("day") <= day_of(until_ms))
    within = (F.col("read_ms") >= since_ms) & (F.col("read_ms") < until_ms)
    reads = reads.where(days & within).select("user_hash", *COLUMNS[1:])
    if reads.isEmpty():
        raise InputError(
            f"{part.path} holds no read of checkpoint {checkpoint_id} within that time and of this key; do its rankers "
            "run with --read-log?"
        )
    return reads


def stored_reads(users: DataFrame, store: StoreHandle, checkpoint_id: str) -> DataFrame:
    """The rows of these users, read from the store by the executors each time that this is evaluated."""
    return users.select("user_id").mapInArrow(_reader(store, checkpoint_id), READ)


def _reader(store: StoreHandle, checkpoint_id: str) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def read_task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        rows = store.open()
        for batch in batches:
            users = batch["user_id"].to_pylist()
            for start in range(0, len(users), USERS_PER_READ):
                asked = users[start : start + USERS_PER_READ]
                now_ms = int(time.time() * 1000)
                found = rows.get_rows(checkpoint_id, asked)
                reads = [_read(user_id, row, now_ms) for user_id, row in zip(asked, found, strict=True)]
                yield pa.RecordBatch.from_pylist(reads, _STORED)

    return read_task


def _read(user_id: str, row: RowBytes | None, now_ms: int) -> dict[str, object]:
    read: dict[str, object] = {"user_id": user_id, "read_ms": now_ms, "history": "absent"}
    if row is None:
        return read
    stamp = _stamp(row.recent, RECENT_MAGIC)
    read |= {"history": "fresh", "folded": row.folded, "recent": row.recent}
    if stamp is not None:
        read |= {"epoch": stamp.epoch, "partition": stamp.partition, "offset": stamp.offset}
    # Of a damaged row, what is left of it may tell.
    either = stamp or _stamp(row.folded, FOLDED_MAGIC)
    return read | {"revision": either and either.revision}


def _stamp(part: bytes, magic: bytes) -> Stamp | None:
    try:
        return read_header(part, magic).stamp
    except WireError:
        return None


def day_of(time_ms: int) -> str:
    """As the read log has it."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d")
