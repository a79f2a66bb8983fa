"""One Spark session for every job: Delta on, small local defaults, any master by option."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from py4j.protocol import Py4JJavaError
from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from jobs.jars import delta_jars, require_java
from models.errors import (
    CheckpointError,
    ForeignRowError,
    InputError,
    MachineError,
    MismatchError,
    StoreError,
    TableBehindError,
    UnavailableError,
    VqlError,
    WireError,
)

LOCAL = "local[2]"
# spark-submit has started this process: its master, memory and classpath hold, unless another master is named.
SUBMITTED = "PYSPARK_GATEWAY_PORT"
# An id is looked up once for each batch that it occurs in.
EVENTS_PER_BATCH = 100_000
LOG4J = Path(__file__).with_name("log4j2.properties").as_uri()
# pyspark has classes for some of what the Java side throws; the rest comes as py4j's.
SPARK_ERRORS = (PySparkException, Py4JJavaError)
RAISED_BY_WORKERS = (
    *(InputError, CheckpointError, MismatchError, TableBehindError, WireError, ForeignRowError),
    *(StoreError, UnavailableError, MachineError),
)


def open_spark(
    master: str = LOCAL, name: str = "vql", jars: Sequence[Path] = (), stage_bars: bool = True
) -> SparkSession:
    """The session of this process, started if need be, with Delta's jars and these.

    stage_bars: Spark's own progress on a terminal; a job that shows its own has no use for it. A session that runs
    already stays as it was started. Raises MachineError without Java or jars.
    """
    require_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # pyspark logs every analysis error with its Java stack before raising it, py4j what a batch's function raised;
    # the raise is enough.
    for name_of_logger in ("SQLQueryContextLogger", "DataFrameQueryContextLogger", "py4j.clientserver"):
        logging.getLogger(name_of_logger).setLevel(logging.CRITICAL)
    settings = {
        "spark.jars": ",".join(str(jar) for jar in (*delta_jars(), *jars)),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.session.timeZone": "UTC",
        # A cell that a declared column expression cannot read is null, and its row no event; it must not end the job.
        "spark.sql.ansi.enabled": "false",
        "spark.sql.adaptive.coalescePartitions.parallelismFirst": "false",
        # pandas writes nanosecond timestamps, which Spark reads only as integers.
        "spark.sql.legacy.parquet.nanosAsLong": "true",
        "spark.sql.execution.arrow.maxRecordsPerBatch": str(EVENTS_PER_BATCH),
        "spark.ui.enabled": "false",
        "spark.ui.showConsoleProgress": str(stage_bars and sys.stderr.isatty()).lower(),
    }
    submitted = master == LOCAL and SUBMITTED in os.environ
    if master.startswith("local") and not submitted:
        settings |= {
            "spark.driver.memory": os.environ.get("VQL_DRIVER_MEMORY", "2g"),
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.sql.shuffle.partitions": "4",
            "spark.databricks.delta.snapshotPartitions": "2",
            "spark.driver.extraJavaOptions": f"-XX:+UseSerialGC -XX:-UsePerfData -Dlog4j2.configurationFile={LOG4J}",
            "spark.sql.warehouse.dir": "build/spark-warehouse",
        }
    builder = SparkSession.builder.appName(name)
    if not submitted:
        builder = builder.master(master)
    for key, value in settings.items():
        builder = builder.config(key, value)
    return builder.getOrCreate()


def read_delta(spark: SparkSession, path: Path | str, version: int | None = None) -> DataFrame:
    """A Delta table, now or as of a version. Raises InputError when there is none at the path."""
    reader = spark.read.format("delta")
    if version is not None:
        reader = reader.option("versionAsOf", version)
    try:
        return reader.load(str(path))
    except SPARK_ERRORS as error:
        raise InputError(f"{path} is not a Delta table of this product ({said_by(error)}); run: vql ingest") from error


def table_version(spark: SparkSession, path: Path | str) -> int:
    """The newest version of a Delta table."""
    from delta.tables import DeltaTable

    return DeltaTable.forPath(spark, str(path)).history(1).collect()[0]["version"]


def said_by(error: Exception) -> str:
    """The one sentence of a Spark error that says what is wrong, without its Java stack."""
    text = str(error)
    if isinstance(error, Py4JJavaError):
        text = text.partition("\n: ")[2]
    return text.strip().partition("\n")[0]


@contextmanager
def errors_of_workers() -> Iterator[None]:
    """Around a job: an error of this product that a worker raised is raised here as what it was.

    Workers are other processes, so Spark and torchrun hand their errors back as text. A disk that fills up under
    Spark's own files becomes a MachineError.
    """
    try:
        yield
    except (*SPARK_ERRORS, RuntimeError) as error:
        raised = _as_raised(str(error))
        if raised is None:
            raise
        raise raised from error


def _as_raised(text: str) -> VqlError | None:
    found = re.search(r"models\.errors\.(\w+): (.+)", text)
    for kind in RAISED_BY_WORKERS:
        if found and found[1] == kind.__name__:
            return kind(found[2])
    if "No space left on device" in text:
        return MachineError(f"no space left on a disk that Spark writes to ({_line_with(text, 'No space')}); free some")
    return None


def _line_with(text: str, words: str) -> str:
    return next(line.strip() for line in text.splitlines() if words in line)
