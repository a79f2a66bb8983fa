"""The figures: what the steps report comes out under the names that alert rules and dashboard use."""

from __future__ import annotations

import json

import numpy as np
import pytest

from pipelines.metrics import _OUTCOMES, _TOTALS, StreamMetrics
from pipelines.update import COUNTED, UpdateCounts


class Clock:
    def __init__(self, now_s: float) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock(1_000.0)


@pytest.fixture
def metrics(clock: Clock) -> StreamMetrics:
    made = StreamMetrics(clock)
    made.begin({0: -1, 1: 99})
    return made


def value(metrics: StreamMetrics, name: str, **labels: str) -> float | None:
    return metrics.registry.get_sample_value(name, labels)


def test_every_count_of_an_update_is_a_metric() -> None:
    assert set(COUNTED) <= _OUTCOMES.keys() | _TOTALS.keys()


def test_an_updates_counts_are_added_up(metrics: StreamMetrics) -> None:
    for _ in range(2):
        metrics.observe(UpdateCounts(events_folded=7, events_skipped=2, conflicts=1, rows_written=3, bytes_written=40))
    assert value(metrics, "vql_stream_events_total", outcome="folded") == 14
    assert value(metrics, "vql_stream_events_total", outcome="skipped") == 4
    assert value(metrics, "vql_stream_put_conflicts_total") == 2
    assert value(metrics, "vql_stream_rows_written_total") == 6
    assert value(metrics, "vql_stream_written_bytes_total") == 80


def test_outcomes_add_up_to_the_records_and_letters_have_a_reason(metrics: StreamMetrics) -> None:
    metrics.dead_letters(["json", "json", "schema"])
    metrics.observe(UpdateCounts(events_folded=5))
    metrics.encoded(2, 1)
    assert metrics.total("vql_stream_events_total") == 8
    assert value(metrics, "vql_stream_dead_letters_total", reason="json") == 2
    assert value(metrics, "vql_stream_unknown_total", what="item") == 2


def test_an_event_is_visible_when_its_row_was_put(metrics: StreamMetrics, clock: Clock) -> None:
    metrics.taken(0, np.array([4, 5, 6]), np.array([999_900, 998_500, -1]))
    assert value(metrics, "vql_stream_event_to_visible_seconds_count") == 0
    clock.now_s = 1_000.2
    metrics.put(0)
    # 0.3 s and 1.7 s; the third has no time in the log.
    assert value(metrics, "vql_stream_event_to_visible_seconds_count") == 2
    assert value(metrics, "vql_stream_event_to_visible_seconds_sum") == pytest.approx(2.0)
    assert value(metrics, "vql_stream_event_to_visible_seconds_bucket", le="0.5") == 1
    assert value(metrics, "vql_stream_event_to_visible_seconds_bucket", le="2.0") == 2
    metrics.put(0)
    assert value(metrics, "vql_stream_event_to_visible_seconds_count") == 2


def test_the_lag_counts_what_is_not_in_rows_whether_put_or_refused(metrics: StreamMetrics) -> None:
    assert value(metrics, "vql_stream_lag_events", partition="0") is None
    metrics.log_end(0, 9)
    assert value(metrics, "vql_stream_lag_events", partition="0") == 10
    metrics.taken(0, np.array([3, 6]), np.array([-1, -1]))
    metrics.put(0)
    assert value(metrics, "vql_stream_lag_events", partition="0") == 3
    metrics.committed(0, 9)
    assert value(metrics, "vql_stream_lag_events", partition="0") == 0
    assert value(metrics, "vql_stream_in_rows_offset", partition="0") == 9


def test_the_lag_in_seconds_is_since_the_rows_were_last_whole(metrics: StreamMetrics, clock: Clock) -> None:
    def lag_s() -> float | None:
        return value(metrics, "vql_stream_lag_seconds", partition="0")

    metrics.log_end(0, 9)
    clock.now_s = 1_005.0
    assert lag_s() == 5.0, "nothing is known but that the stream started"
    metrics.taken(0, np.array([6]), np.array([700_000]))
    metrics.put(0)
    assert lag_s() == 305.0, "the newest record in the rows is of second 700"
    metrics.committed(0, 9)
    assert lag_s() == 0.0
    clock.now_s = 9_000.0
    metrics.log_end(0, 9)
    clock.now_s = 9_002.0
    metrics.log_end(0, 10)
    assert lag_s() == 2.0, "a record after a long silence makes no lag of the silence"


def test_a_partition_is_ready_at_its_end_or_with_its_first_put(metrics: StreamMetrics) -> None:
    at = metrics.partitions
    metrics.log_end(0, 9)
    metrics.log_end(1, 99)
    assert (at[0].ready, at[1].ready) == (False, True)
    metrics.taken(0, np.array([0]), np.array([-1]))
    metrics.put(0)
    assert at[0].ready


def test_another_streams_partitions_are_no_ones_lag(metrics: StreamMetrics) -> None:
    metrics.log_end(7, 5)
    metrics.put(7)
    metrics.committed(7, 5)
    assert value(metrics, "vql_stream_lag_events", partition="7") is None


STATISTICS = {
    "rx_bytes": 1234,
    "brokers": {
        "a:1/1": {"state": "UP", "rtt": {"p99": 2500, "avg": 3}},
        "a:1/bootstrap": {"state": "DOWN", "rtt": {"p99": 0}},
    },
    "topics": {"t": {"partitions": {"1": {"fetchq_cnt": 17, "consumer_lag": 42}, "-1": {"fetchq_cnt": 0}}}},
}


def test_the_clients_statistics_become_a_few_gauges(metrics: StreamMetrics) -> None:
    metrics.kafka_statistics(1, json.dumps(STATISTICS))
    assert value(metrics, "vql_kafka_received_bytes_total", partition="1") == 1234
    assert value(metrics, "vql_kafka_fetch_queue_records", partition="1") == 17
    assert value(metrics, "vql_kafka_consumer_lag_events", partition="1") == 42
    assert value(metrics, "vql_kafka_broker_rtt_p99_seconds", partition="1") == 0.0025
    assert value(metrics, "vql_kafka_brokers_up", partition="1") == 1
