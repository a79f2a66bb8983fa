"""Files to the log: `vql ingest` turns declared columns into events with a partition and an offset each.

The log is one Delta table, `events`, partitioned by log partition. A user's events share a partition
(crc32(user_id) mod partitions, librdkafka's "consistent" rule), and offsets are dense per partition: the log
position is the clock of everything downstream. `value` keeps the event's own bytes.

Running the same input again appends nothing: events whose event_id the log already holds are left out. What is no
event goes to the table `quarantine` with its reason and the source row. The quarantine is written first and the
events in one commit, so a kill between the two loses nothing and repeats nothing.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import deltalake
import numpy as np
import pyarrow as pa
from delta.tables import DeltaTable
from pyspark.errors import PythonException
from pyspark.sql import DataFrame, Row, SparkSession, Window
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema
from pyspark.sql.types import ArrayType, NumericType, StructField

from jobs.event_log import create_log, forgotten_of, log_facts
from jobs.spark import SPARK_ERRORS, errors_of_workers, read_delta, said_by, table_version
from models.errors import InputError
from models.event import UNKNOWN_TIME, Event, Records, parse_batch
from models.forgotten import FORGOTTEN_USER, Forgotten, users_of

EVENT_FIELDS = tuple(f for f in Event.__struct_fields__)
CHECKED_ARROW = pa.schema(
    [
        *((name, pa.string()) for name in ("event_id", "user_id", "item_id", "action")),
        ("event_time_ms", pa.int64()),
        ("weight", pa.float64()),
        ("value", pa.binary()),
        *((name, pa.string()) for name in ("source", "reason", "detail")),
    ]
)
INGEST_APP = "vql-ingest"


@dataclass(frozen=True, kw_only=True, slots=True)
class EventSource:
    """Files and, for each event field, the SQL expression over their columns that gives it.

    A field that is not declared is read from the column of its own name. `where` keeps some rows only. `rows` reads
    what is not simply the rows of one file; `path` then only says where they are from.
    """

    path: Path
    format: str
    columns: Mapping[str, str]
    where: str = "true"
    rows: Callable[[SparkSession], DataFrame] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NewLog:
    """What a log is made with; one that exists keeps its own. The epoch rises when a log replaces another."""

    partitions: int = 4
    epoch: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class IngestReport:
    """Rows read = appended + already in the log + quarantined + of forgotten users (in this run's input)."""

    read: int
    appended: int
    already: int
    quarantined: int
    forgotten: int = 0


@errors_of_workers()
def ingest(spark: SparkSession, source: EventSource, log: Path, new: NewLog = NewLog()) -> IngestReport:
    """Append the source's events to log/events. Raises InputError for a missing file or column."""
    check = partial(_check, forgotten=forgotten_of(log))
    ranked = _mark_repeats(read_source(spark, source).mapInArrow(check, from_arrow_schema(CHECKED_ARROW))).persist()
    left_out = F.col("reason") == FORGOTTEN_USER
    try:
        counts = _only_row(
            ranked.agg(
                F.count("*").alias("read"),
                F.count(F.when(~left_out, 1)).alias("bad"),
                F.count(F.when(left_out, 1)).alias("forgotten"),
            ),
            source.path,
        )
        if counts["read"] == 0:
            raise InputError(f"{source.path} holds no rows; nothing was ingested")
        if counts["bad"]:
            _quarantine(spark, ranked.where(~left_out), log / "quarantine")
        appended = _append(spark, ranked.where("reason IS NULL"), log / "events", new)
    finally:
        ranked.unpersist()
    already = counts["read"] - counts["bad"] - counts["forgotten"] - appended
    return IngestReport(
        read=counts["read"],
        appended=appended,
        already=already,
        quarantined=counts["bad"],
        forgotten=counts["forgotten"],
    )


def read_source(spark: SparkSession, source: EventSource) -> DataFrame:
    """The event as JSON (`value`) and the source row as JSON (`source`). Raises InputError."""
    unknown = set(source.columns) - set(EVENT_FIELDS)
    if unknown:
        raise InputError(f"{sorted(unknown)} are no event fields; declare some of {list(EVENT_FIELDS)}")
    raw = source.rows(spark) if source.rows is not None else read_files(spark, source.path, source.format)
    raw = _where(raw, source.where)
    expressions = {f: source.columns.get(f, f if f in raw.columns else None) for f in EVENT_FIELDS}
    expressions["weight"] = expressions["weight"] or "1.0"
    missing = [f for f, e in expressions.items() if e is None]
    if missing:
        raise InputError(
            f"{source.path} has no column for {missing}; declare one with --column {missing[0]}=EXPRESSION "
            f"(its columns: {', '.join(raw.columns)})"
        )
    types = {"event_time_ms": "long", "weight": "double"}
    fields = {f: f"try_cast(({e}) AS {types.get(f, 'string')})" for f, e in expressions.items()}
    # No weight means 1, but a weight that is no number must not: NaN fails the event's check.
    blank = f"coalesce(trim(CAST(({expressions['weight']}) AS STRING)), '') = ''"
    fields["weight"] = f"coalesce({fields['weight']}, if({blank}, NULL, double('NaN')))"
    event = F.struct(*(F.expr(e).alias(f) for f, e in fields.items()))
    try:
        return raw.select(F.to_json(event).alias("value"), F.to_json(F.struct("*")).alias("source"))
    except SPARK_ERRORS as error:
        raise InputError(f"{source.path}: a column expression cannot be used: {said_by(error)}") from error


@errors_of_workers()
def ingest_items(spark: SparkSession, path: Path, format_: str, columns: Mapping[str, str], log: Path) -> int:
    """Replace log/items by the declared columns of files, `item_id` and any static features; how many items.

    All are text, but arrays, which stay what they are: of float32 if they hold numbers, else of text.

    Raises InputError for a missing file or column, for no rows, and for an item without an id or with two rows.
    """
    return replace_items(spark, read_files(spark, path, format_), columns, path, log)


def replace_items(spark: SparkSession, raw: DataFrame, columns: Mapping[str, str], path: Path, log: Path) -> int:
    """As ingest_items, of rows that were read from `path`."""
    if "item_id" not in columns and "item_id" not in raw.columns:
        raise InputError(f"{path} has no column item_id; declare one with --column item_id=EXPRESSION")
    expressions = {"item_id": "item_id", **columns}
    try:
        items = raw.select(*(F.expr(f"({e})").alias(name) for name, e in expressions.items()))
        items = items.select(*(F.col(f"`{field.name}`").cast(_kept_as(field)) for field in items.schema))
    except SPARK_ERRORS as error:
        raise InputError(f"{path}: a column expression cannot be used: {said_by(error)}") from error
    rows_of = items.groupBy("item_id").count()
    odd = F.when((F.col("count") > 1) | (F.coalesce("item_id", F.lit("")) == ""), F.struct("item_id", "count"))
    found = _only_row(rows_of.agg(F.count("*").alias("items"), F.max(odd).alias("odd")), path)
    if found["items"] == 0:
        raise InputError(f"{path} holds no rows; the items stay as they are")
    if found["odd"]:
        item_id, count = found["odd"]
        raise InputError(f"{path} holds {count} rows of item {item_id!r}; give each item an id and one row")
    items.write.format("delta").mode("overwrite").option("overwriteSchema", True).save(str(log / "items"))
    return read_delta(spark, log / "items").count()


def _kept_as(field: StructField) -> str:
    """The type of a column of the items table."""
    if field.name == "item_id" or not isinstance(field.dataType, ArrayType):
        return "string"
    return "array<float>" if isinstance(field.dataType.elementType, NumericType) else "array<string>"


def _where(raw: DataFrame, where: str) -> DataFrame:
    try:
        return raw.where(where)
    except SPARK_ERRORS as error:
        raise InputError(f"--where {where!r} cannot be used: {said_by(error)}") from error


def _only_row(counted: DataFrame, path: Path) -> Row:
    """The one row of an aggregate over a file: where what cannot be read, or computed from it, comes to light."""
    try:
        return counted.collect()[0]
    except PythonException:
        raise
    except SPARK_ERRORS as error:
        raise InputError(f"{path} cannot be read to its end: {said_by(error)}") from error


def read_files(spark: SparkSession, path: Path, format_: str) -> DataFrame:
    """Parquet, or CSV with a header, every column as text. Raises InputError."""
    if not path.exists():
        raise InputError(f"{path} does not exist; give --input an existing file or folder")
    try:
        if format_ == "csv":
            # A quote within quotes is doubled (RFC 4180); Spark's own default is a backslash before it.
            return spark.read.options(header=True, mode="PERMISSIVE", escape='"').csv(str(path))
        if format_ == "parquet":
            return spark.read.parquet(str(path))
    except SPARK_ERRORS as error:
        raise InputError(f"{path} cannot be read as {format_}; is --format right? ({said_by(error)})") from error
    raise InputError(f"format {format_!r} is not known; give csv or parquet")


def _check(batches: Iterator[pa.RecordBatch], forgotten: Forgotten) -> Iterator[pa.RecordBatch]:
    """Each row's event checked by the one contract, models.event: a batch of events, then one of rejects.

    Of rows of forgotten users only that there were some is told.
    """
    for batch in batches:
        values = [v.encode() for v in batch["value"].to_pylist()]
        sources = batch["source"]
        records = Records(
            epoch=0,
            partition=0,
            offset_N=np.arange(len(values)),
            log_time_ms_N=np.full(len(values), UNKNOWN_TIME),
            keys=[None] * len(values),
            values=values,
        )
        good, rejects = parse_batch(records)
        if forgotten:
            gone_N = forgotten.before_N(good.user_ids, good.time_ms_N)
            bad = [reject for reject in rejects if not _names_forgotten(reject.value, forgotten)]
            gone = int(gone_N.sum()) + len(rejects) - len(bad)
            good, rejects = good.where(~gone_N), bad
            yield _checked(value=[None] * gone, reason=[FORGOTTEN_USER] * gone)
        yield _checked(
            event_id=good.event_ids,
            user_id=good.user_ids,
            item_id=good.item_ids,
            action=good.actions,
            event_time_ms=good.time_ms_N,
            weight=good.weight_N.astype(np.float64),
            value=[values[i] for i in good.offset_N],
        )
        if rejects:
            yield _checked(
                value=[r.value for r in rejects],
                source=sources.take(pa.array([r.offset for r in rejects])),
                reason=[r.reason for r in rejects],
                detail=[r.detail for r in rejects],
            )


def _names_forgotten(value: bytes | None, forgotten: Forgotten) -> bool:
    """A bad row's time cannot be trusted, so whoever was forgotten once stays so in it."""
    return bool(forgotten.before_N(users := users_of(None, value), np.zeros(len(users))).any())


def _checked(**columns: Sequence) -> pa.RecordBatch:
    """A batch of CHECKED_ARROW with nulls where no column is given."""
    rows = len(columns["value"])
    arrays = [pa.array(columns.get(f.name, [None] * rows), f.type) for f in CHECKED_ARROW]
    return pa.record_batch(arrays, schema=CHECKED_ARROW)


def _mark_repeats(checked: DataFrame) -> DataFrame:
    """Of several events with one id in this input, all but the first get the reason "repeated"."""
    # Rejects have no event_id; by their value they spread over all tasks.
    same = F.coalesce("event_id", F.sha2("value", 256))
    first = Window.partitionBy(same, F.col("reason").isNull()).orderBy("event_time_ms", "value")
    repeated = F.col("reason").isNull() & (F.row_number().over(first) > 1)
    marked = checked.withColumn("repeated", repeated)
    return marked.select(
        *(c for c in checked.columns if c not in ("reason", "detail")),
        F.when(F.col("repeated"), "repeated").otherwise(F.col("reason")).alias("reason"),
        F.when(F.col("repeated"), "event_id occurs twice in the input").otherwise(F.col("detail")).alias("detail"),
    )


def _quarantine(spark: SparkSession, bad: DataFrame, path: Path) -> None:
    """Append the bad rows that the table does not hold yet."""
    # Good rows do not carry their source, which is most of the bytes; of a repeated event its own are kept.
    bad = bad.withColumn("source", F.coalesce("source", F.col("value").cast("string")))
    bad = bad.select("reason", "detail", "source", F.sha2(F.concat_ws("|", "reason", "source"), 256).alias("digest"))
    bad = bad.dropDuplicates(["digest"])
    if DeltaTable.isDeltaTable(spark, str(path)):
        bad = bad.join(read_delta(spark, path).select("digest"), "digest", "left_anti")
    bad.select("digest", "reason", "detail", "source").write.format("delta").mode("append").save(str(path))


def _append(spark: SparkSession, events: DataFrame, path: Path, new: NewLog) -> int:
    """Give the new events their offsets and commit them at once; how many there were."""
    if not DeltaTable.isDeltaTable(spark, str(path)):
        create_log(spark, path, {"vql.partitions": str(new.partitions), "vql.epoch": str(new.epoch)})
    facts = log_facts(spark, path)
    if facts.topic_id is not None:
        raise InputError(f"{path} is the copy of a Kafka topic; give --log another folder for events of files")
    version = table_version(spark, path)
    log = read_delta(spark, path, version)
    fresh = events.join(log.select("event_id"), "event_id", "left_anti")
    fresh = fresh.withColumn("partition", F.expr(f"CAST(crc32(CAST(user_id AS BINARY)) % {facts.partitions} AS INT)"))
    ends = log.groupBy("partition").agg(F.max("offset").alias("end"))
    # A retraction has the time of its event, and must come after it.
    order = Window.partitionBy("partition").orderBy("event_time_ms", F.col("weight") < 0, "event_id")
    fresh = fresh.join(F.broadcast(ends), "partition", "left").select(
        F.lit(facts.epoch).cast("int").alias("epoch"),
        "partition",
        (F.coalesce("end", F.lit(-1)) + F.row_number().over(order)).cast("long").alias("offset"),
        *("event_id", "user_id", "item_id", "action", "event_time_ms", "weight"),
        F.lit(None).cast("long").alias("log_time_ms"),
        "value",
    )
    run = uuid.uuid4().hex
    # The next version of this application after the one that the table shows: of two ingests that saw the same, Delta
    # takes one, whatever else (an OPTIMIZE) is committed in between. So offsets are unique.
    turn = (deltalake.DeltaTable(path, version=version).transaction_version(INGEST_APP) or 0) + 1
    writer = fresh.write.format("delta").mode("append").option("userMetadata", run)
    try:
        writer.option("txnAppId", INGEST_APP).option("txnVersion", turn).save(str(path))
    except SPARK_ERRORS as error:
        if "ConcurrentTransaction" in str(error):
            raise InputError(f"another ingest wrote to {path} at the same time; run this one again") from error
        raise
    last = DeltaTable.forPath(spark, str(path)).history().where(F.col("userMetadata") == run).collect()
    if not last:
        raise InputError(f"another ingest wrote to {path} at the same time; run this one again")
    return int(last[0]["operationMetrics"]["numOutputRows"])
