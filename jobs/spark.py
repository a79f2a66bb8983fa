"""One Spark session for every job: Delta on, small local defaults, any master by option."""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path

from pyspark.errors import PySparkException
from pyspark.sql import DataFrame, SparkSession

from jobs.jars import delta_jars, require_java
from models.errors import InputError

LOCAL = "local[2]"
LOG4J = Path(__file__).with_name("log4j2.properties").as_uri()


def open_spark(master: str = LOCAL, name: str = "vql") -> SparkSession:
    """The session of this process, started if need be. Raises MachineError without Java or jars."""
    require_java()
    os.environ.setdefault("PYSPARK_PYTHON", sys.executable)
    # pyspark logs every analysis error with its Java stack before raising it; the raise is enough.
    logging.getLogger("SQLQueryContextLogger").setLevel(logging.CRITICAL)
    settings = {
        "spark.jars": ",".join(str(jar) for jar in delta_jars()),
        "spark.sql.extensions": "io.delta.sql.DeltaSparkSessionExtension",
        "spark.sql.catalog.spark_catalog": "org.apache.spark.sql.delta.catalog.DeltaCatalog",
        "spark.sql.session.timeZone": "UTC",
        "spark.sql.adaptive.coalescePartitions.parallelismFirst": "false",
        # pandas writes nanosecond timestamps, which Spark reads only as integers.
        "spark.sql.legacy.parquet.nanosAsLong": "true",
        "spark.ui.enabled": "false",
        "spark.log.level": "ERROR",
        "spark.ui.showConsoleProgress": str(sys.stderr.isatty()).lower(),
    }
    if master.startswith("local"):
        settings |= {
            "spark.driver.memory": os.environ.get("VQL_DRIVER_MEMORY", "2g"),
            "spark.driver.bindAddress": "127.0.0.1",
            "spark.driver.host": "127.0.0.1",
            "spark.sql.shuffle.partitions": "4",
            "spark.databricks.delta.snapshotPartitions": "2",
            "spark.driver.extraJavaOptions": f"-XX:+UseSerialGC -XX:-UsePerfData -Dlog4j2.configurationFile={LOG4J}",
            "spark.sql.warehouse.dir": "build/spark-warehouse",
        }
    builder = SparkSession.builder.master(master).appName(name)
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
    except PySparkException as error:
        first = str(error).strip().splitlines()[0]
        raise InputError(f"{path} is not a Delta table of this product ({first}); run: vql ingest") from error


def table_version(spark: SparkSession, path: Path | str) -> int:
    """The newest version of a Delta table."""
    from delta.tables import DeltaTable

    return DeltaTable.forPath(spark, str(path)).history(1).collect()[0]["version"]
