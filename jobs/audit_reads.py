"""What is audited: reads that rankers logged, and rows as the store holds them now. Both as the same columns."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from feature_repo.handle import StoreHandle
from jobs.read_log import READ, day_of, stamp_of
from jobs.spark import read_delta
from models.errors import InputError
from models.row import RowBytes
from models.user_hash import key_id, user_hash_key
from models.wire import FOLDED_MAGIC, RECENT_MAGIC

USERS_PER_READ = 200
# Of whom, and the read. revision: of either part, if one is sound.
USER_READ = pa.schema([("user_id", pa.string()), *READ])
COLUMNS = USER_READ.names


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
    return users.select("user_id").mapInArrow(_reader(store, checkpoint_id), from_arrow_schema(USER_READ))


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
                yield pa.RecordBatch.from_pylist(reads, USER_READ)

    return read_task


def _read(user_id: str, row: RowBytes | None, now_ms: int) -> dict[str, object]:
    read: dict[str, object] = {"user_id": user_id, "read_ms": now_ms, "history": "absent"}
    if row is None:
        return read
    stamp = stamp_of(row.recent, RECENT_MAGIC)
    read |= {"history": "fresh", "folded": row.folded, "recent": row.recent}
    if stamp is not None:
        read |= {"epoch": stamp.epoch, "partition": stamp.partition, "offset": stamp.offset}
    # Of a damaged row, what is left of it may tell.
    either = stamp or stamp_of(row.folded, FOLDED_MAGIC)
    return read | {"revision": either and either.revision}
