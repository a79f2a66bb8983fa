"""What several folders of tests share: the one Spark session and the one Kafka broker of a test run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING
from uuid import uuid4

import pytest

if TYPE_CHECKING:
    from pyspark.sql import SparkSession

    from tests.kafka_broker import Broker


# Tests run side by side, and small tensors gain nothing from threads that wait for one another: torch reads this once.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest first, those that need a time limit of their own: begun last, one of them would be waited for."""
    items.sort(key=lambda item: item.get_closest_marker("timeout") is None)


@pytest.fixture(scope="session")
def spark() -> Iterator[SparkSession]:
    """The product's own session, started by the first test that asks for it."""
    from jobs.jars import kafka_source_jars
    from jobs.spark import open_spark

    # Tests run each query once or twice: Java's second compiler would only take their time.
    os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1")
    session = open_spark(name="vql-tests", jars=kafka_source_jars())
    yield session
    session.stop()


@pytest.fixture(scope="session")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    """Started by the first test that asks for it."""
    from tests.kafka_broker import running_broker

    with running_broker(tmp_path_factory.mktemp("broker")) as running:
        yield running


@pytest.fixture
def topic(broker: Broker) -> str:
    """A new topic of two partitions."""
    return broker.create_topic(f"events-{uuid4().hex}")
