"""What the jobs know of an event log: its Delta table, what that says of itself, and which of its events stand.

A log is made from files, with offsets that are dense, or it is the copy of a Kafka topic, with the topic's offsets,
which need not be: compaction, transactions and records in quarantine leave holes. A table may hold records of older
epochs; a new epoch holds the topic anew, so nobody reads them. Of a forgotten user's tombstone the place stays, a row
with neither user nor value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from feature_repo.forgotten import FORGOTTEN, ForgottenRef, read_forgotten
from jobs.spark import read_delta
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.forgotten import Forgotten, Request
from models.user_hash import chosen_key_file

LOG_SCHEMA = (
    "epoch int, partition int, offset long, event_id string, user_id string, item_id string, action string, "
    "event_time_ms long, weight double, log_time_ms long, value binary"
)
TOMBSTONE = "value IS NULL"


@dataclass(frozen=True, kw_only=True, slots=True)
class LogFacts:
    """What a log says of itself.

    log_id is the Delta table's, and changes when the log is made anew; topic_id is that of the Kafka topic that the
    log is the copy of, None for a log of files. dense: there is an event at every offset.
    """

    log_id: str
    epoch: int
    partitions: int
    topic_id: str | None = None
    dense: bool = True


def create_log(spark: SparkSession, path: Path, properties: Mapping[str, str]) -> None:
    """An empty table `events` with these properties, unless there is one."""
    builder = DeltaTable.createIfNotExists(spark).location(str(path)).partitionedBy("partition")
    for column in LOG_SCHEMA.split(", "):
        builder = builder.addColumn(*column.split(" "))
    for name, value in properties.items():
        builder = builder.property(name, value)
    builder.execute()


def log_facts(spark: SparkSession, events: Path) -> LogFacts:
    """From the table's properties. Raises InputError for a table without them."""
    log_id, properties = DeltaTable.forPath(spark, str(events)).detail().select("id", "properties").collect()[0]
    try:
        return LogFacts(
            log_id=log_id,
            epoch=int(properties["vql.epoch"]),
            partitions=int(properties["vql.partitions"]),
            topic_id=properties.get("vql.topic_id"),
            dense=properties.get("vql.dense", "true") == "true",
        )
    except (KeyError, ValueError) as error:
        raise InputError(f"{events} is no event log: its table property {error} is wrong") from error


def read_records(spark: SparkSession, log: Path, version: int | None = None) -> DataFrame:
    """The rows of the log's epoch, tombstones among them. Raises InputError when there is no log."""
    rows = read_delta(spark, log / "events", version)
    return rows.where(F.col("epoch") == log_facts(spark, log / "events").epoch)


def forgotten_of(log: Path) -> Forgotten:
    """Who was forgotten of this log, by the key that the environment names. Raises InputError as read_forgotten."""
    return read_forgotten(ForgottenRef(path=log / FORGOTTEN, key_file=chosen_key_file()))


def forgotten_here(records: DataFrame, forgotten: Forgotten) -> dict[str, tuple[Request, ...]]:
    """The forgotten users of whom there are records: as whom a request left them, or as a copy brought them back."""
    if not forgotten:
        return {}
    users = records.where("user_id IS NOT NULL").select("user_id").distinct()
    found = users.mapInArrow(partial(_only_forgotten, forgotten), "user_id string").collect()
    return {row[0]: forgotten.of(row[0]) for row in found}


def _only_forgotten(forgotten: Forgotten, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    for batch in batches:
        known = [bool(forgotten.of(user_id)) for user_id in batch["user_id"].to_pylist()]
        yield batch.filter(pa.array(known, pa.bool_()))


def without_forgotten(records: DataFrame, gone: Mapping[str, Sequence[Request]]) -> DataFrame:
    """Records without those that are forgotten, and without blank places. A request's own tombstone goes as well."""
    named = records.where("user_id IS NOT NULL")
    return not_covered(named, gone) if gone else named


def not_covered(places: DataFrame, gone: Mapping[str, Sequence[Request]], until: str = "true") -> DataFrame:
    """Rows of users and positions (as `place`) that no request covers; until: a further condition on both."""
    rows = [(user_id, *request) for user_id, requests in gone.items() for request in requests]
    columns = "user_id string, epoch int, partition int, offset long, requested_ms long"
    requests = F.broadcast(places.sparkSession.createDataFrame(rows, columns)).alias("request")
    covered = F.expr(
        "place.user_id = request.user_id AND (place.epoch < request.epoch OR (place.epoch = request.epoch AND "
        f"place.partition = request.partition AND place.offset <= request.offset)) AND {until}"
    )
    return places.alias("place").join(requests, covered, "left_anti")


def tombstones(spark: SparkSession, gone: Mapping[str, Sequence[Request]], epoch: int) -> DataFrame:
    """Where each of these users was forgotten last within the epoch, as a record: what a new row begins from."""
    newest = {
        user_id: max(here, key=lambda request: request.offset)
        for user_id, requests in gone.items()
        if (here := [request for request in requests if request.epoch == epoch])
    }
    rows = [
        {
            "epoch": epoch,
            "partition": at.partition,
            "offset": at.offset,
            "user_id": user_id,
            "log_time_ms": at.requested_ms,
        }
        for user_id, at in newest.items()
    ]
    return spark.createDataFrame(rows, LOG_SCHEMA)


def read_events(spark: SparkSession, log: Path, version: int | None = None) -> DataFrame:
    """The events that stand: no tombstones, and nothing of a user before the last one. Raises as read_records."""
    records = read_records(spark, log, version)
    return records if log_facts(spark, log / "events").dense else standing(records)


def standing(records: DataFrame) -> DataFrame:
    """Of a log's records the events that stand."""
    erased = records.where(TOMBSTONE).groupBy("user_id").agg(F.max("offset").alias("erased_offset"))
    joined = records.where(f"NOT ({TOMBSTONE})").join(erased, "user_id", "left")
    after = F.col("erased_offset").isNull() | (F.col("offset") > F.col("erased_offset"))
    return joined.where(after).select(records.columns)


def trained_until_ms(spark: SparkSession, log: Path, checkpoint: Checkpoint) -> int:
    """Events from this time on had no part in the checkpoint's training, which was on this log.

    Raises InputError for a checkpoint that does not say what it was trained on, or a log that lacks that version.
    """
    manifest = checkpoint.manifest
    if manifest.trained_before_ms is not msgspec.UNSET:
        return manifest.trained_before_ms
    version = manifest.training.get("log_version")
    if not isinstance(version, int) or version < 0:
        raise InputError(f"{checkpoint.path} does not say what it was trained on; train it by vql train")
    newest = read_events(spark, log, version).agg(F.max("event_time_ms")).collect()[0][0]
    if newest is None:
        raise InputError(f"{log} has no events in version {version}, on which {checkpoint.path} was trained")
    return newest + 1
