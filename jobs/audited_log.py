"""The event log as an audit sees it: one version of it, which users it has, and their rows as of any of their offsets.

A record has been in the log since its own timestamp in the topic. Those of a log of files have none: since the Parquet
file was written that holds them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyspark.sql import DataFrame, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from feature_repo.opened import Opened
from feature_repo.reader import ReadLimits
from jobs.backfill import FOLDED
from jobs.backfill_task import fold_users
from jobs.event_log import (
    TOMBSTONE,
    LogFacts,
    forgotten_here,
    forgotten_of,
    log_facts,
    not_covered,
    standing,
    tombstones,
    without_forgotten,
)
from jobs.spark import read_delta, table_version
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import InputError
from models.forgotten import Request
from models.item_table import read_index
from models.row import encode_row
from models.user_hash import hashed_user, user_hash_key

ROWS_PER_BATCH_BYTES = 16 << 20
# From an item's segment on disk to the table of every stream, and a clock that is not the writer's.
SETTLED_MS = 300_000
# The folders of the segments that `encode_items` makes a table of.
FIRST_RUN = (".", "run-00000")
_ROWS = pa.schema(
    [("place", pa.string()), ("folded", pa.binary()), ("recent", pa.binary()), ("later_items", pa.bool_())]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedLog:
    """A version of a log. records: those of its epoch, and log_ms, since when each was there. ends: last offsets.

    Of forgotten users there is a tombstone where the request is, and what came after it. forgotten: their requests by
    user, unnamed: those whose id the log no longer has, by their hash in hexadecimal, which is their name here.
    """

    version: int
    facts: LogFacts
    records: DataFrame
    ends: dict[int, int]
    forgotten: Mapping[str, tuple[Request, ...]]
    unnamed: Mapping[str, bytes]

    @classmethod
    def open(cls, spark: SparkSession, log: Path) -> AuditedLog:
        """As of now. Raises InputError when there is no log, or nothing in it."""
        # Before anything else is asked of a table that may not be there.
        read_delta(spark, log / "events")
        version, facts = table_version(spark, log / "events"), log_facts(spark, log / "events")
        since = F.coalesce("log_time_ms", F.unix_millis("_metadata.file_modification_time"))
        rows = read_delta(spark, log / "events", version).where(F.col("epoch") == facts.epoch)
        rows = rows.select("*", since.alias("log_ms"))
        ends = {row[0]: row[1] for row in rows.groupBy("partition").agg(F.max("offset")).collect()}
        if not ends:
            raise InputError("the log is empty: there is nothing to compare with; run vql ingest first")
        forgotten = forgotten_of(log)
        named = forgotten_here(rows, forgotten)
        hashes = forgotten.requests.keys() - {forgotten.hash(user_id) for user_id in named}
        unnamed = {user_hash.hex(): user_hash for user_hash in hashes}
        gone = named | {name: forgotten.requests[user_hash] for name, user_hash in unnamed.items()}
        records = without_forgotten(rows, named)
        if gone:
            begun = tombstones(spark, gone, facts.epoch)
            records = records.unionByName(begun.withColumn("log_ms", F.col("log_time_ms")))
        return cls(version=version, facts=facts, records=records, ends=ends, forgotten=gone, unnamed=unnamed)

    def hashed_users(self, key_file: Path | None) -> DataFrame:
        """Every user id with its keyed hash."""
        columns, users = "user_id string, user_hash binary", self.records.select("user_id").distinct()
        if not self.unnamed:
            return users.mapInArrow(_hasher(key_file), columns)
        unnamed = F.broadcast(users.sparkSession.createDataFrame([*self.unnamed.items()], columns))
        hashed = users.join(unnamed, "user_id", "left_anti").mapInArrow(_hasher(key_file), columns)
        return hashed.unionByName(unnamed)

    def after_requests(self, reads: DataFrame) -> DataFrame:
        """Without reads of forgotten users from before the request: they were right, and can't be made anew.

        A ranker that read a row before may have given it for as long as it keeps rows.
        """
        if not self.forgotten:
            return reads
        kept_ms = round(ReadLimits().kept_s * 1000)
        return not_covered(reads, self.forgotten, f"place.read_ms <= request.requested_ms + {kept_ms}")

    def first_standing(self, users: DataFrame) -> DataFrame:
        """Since when the log has had an event of each of these users that no tombstone erases: first_ms."""
        return standing(self.records.join(users, "user_id")).groupBy("user_id").agg(F.min("log_ms").alias("first_ms"))

    def moves(self, users: DataFrame) -> DataFrame:
        """The records of these users that move their stamps: no repeats, which are known by the event id here."""
        again = F.row_number().over(Window.partitionBy("user_id", "event_id").orderBy("offset"))
        numbered = self.records.join(users, "user_id").withColumn("again", again).where(f"again = 1 OR {TOMBSTONE}")
        return numbered.select("user_id", "offset", "log_ms", "event_time_ms")

    def rows_at(self, places: DataFrame, checkpoint: Checkpoint) -> DataFrame:
        """The row of each user as of each offset (user_id, offset, each pair once), by the fold of the backfill.

        Columns user_id, offset, folded, recent, and later_items as `row_difference.difference` wants it. A user without
        a record up to an offset has none.
        """
        # Each place is folded as if it were a user of its own.
        place = F.concat_ws(" ", F.col("offset"), F.col("user_id"))
        upto = places.select(F.col("user_id"), F.col("offset").alias("upto"), place.alias("place"))
        wanted = self.records.join(upto, "user_id").where(F.col("offset") <= F.col("upto"))
        events = wanted.drop("user_id").withColumnRenamed("place", "user_id").selectExpr(*FOLDED, "log_ms")
        sorted_ = events.repartition("user_id").sortWithinPartitions("user_id", "offset")
        rows = sorted_.mapInArrow(_folder(checkpoint.path, self.facts.epoch), from_arrow_schema(_ROWS))
        split = F.split("place", " ", 2)
        return rows.select(
            split[1].alias("user_id"), split[0].cast("long").alias("offset"), "folded", "recent", "later_items"
        )


def known_since_ms(items: Path) -> np.ndarray:
    """Since when every stream has known each item of a table, by its index; 0: since there has been a table."""
    segments = read_index(items).segments
    since = [
        0
        if str(Path(each.name).parent) in FIRST_RUN
        else (items / each.name).stat().st_mtime_ns // 1_000_000 + SETTLED_MS
        for each in segments
    ]
    return np.repeat(np.array(since, np.int64), [segment.items for segment in segments])


def _hasher(key_file: Path | None) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def hash_task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        key = user_hash_key(key_file)
        for batch in batches:
            hashes = [hashed_user(user_id, key) for user_id in batch["user_id"].to_pylist()]
            yield pa.record_batch({"user_id": batch["user_id"], "user_hash": pa.array(hashes, pa.binary())})

    return hash_task


def _folder(path: Path, epoch: int) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def fold_task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        checkpoint = open_checkpoint(path)
        table, since_ms_M = checkpoint.fold().table, known_since_ms(checkpoint.items_path)
        later: set[str] = set()

        def watched() -> Iterator[pa.RecordBatch]:
            for batch in batches:
                item_N = table.lookup(batch["item_id"].to_pylist())
                early_N = batch["log_ms"].to_numpy() < since_ms_M[item_N]
                later.update(batch["user_id"].filter(pa.array(early_N)).to_pylist())
                yield batch

        rows: list[dict[str, object]] = []
        size_bytes = 0
        for place, row in fold_users(watched(), Opened(checkpoint), epoch):
            data = encode_row(row)
            rows.append({"place": place, "folded": data.folded, "recent": data.recent, "later_items": place in later})
            later.discard(place)
            size_bytes += data.size_bytes
            if size_bytes > ROWS_PER_BATCH_BYTES:
                yield pa.RecordBatch.from_pylist(rows, _ROWS)
                rows, size_bytes = [], 0
        yield pa.RecordBatch.from_pylist(rows, _ROWS)

    return fold_task
