"""What several folders of tests share: the one Spark session of a test run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """The product's own session, started by the first test that asks for it."""
    from jobs.spark import open_spark

    # Tests run each query once or twice: Java's second compiler would only take their time.
    os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1")
    session = open_spark(name="vql-tests")
    yield session
    session.stop()
