"""What a stream's process counts and measures, for Prometheus, the health endpoint and the status line. No Beam.

One `StreamMetrics` per process: the steps report to `process_metrics()`. The default runner's worker is a thread of
the process that serves these figures, so they are whole. A runner whose workers are other processes leaves them
empty here: its own metrics hold the same counters (namespace vql), and `stream.run` says so in a warning.

Lag in seconds is how long ago the rows were last known to be whole: now minus the later of the log time of the newest
record in the rows and the last moment at which the partition was at its end; 0 at the end. Before either is known,
since the stream's start.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import msgspec
import numpy as np
from prometheus_client import CollectorRegistry, Counter
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

ROW_BYTES_BUCKETS = tuple(float(1 << power) for power in range(8, 21))
VISIBLE_BUCKETS_S = (0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
# The field of UpdateCounts, and the metric with its outcome that it adds to.
_OUTCOMES = {
    "events_folded": "folded",
    "events_skipped": "skipped",
    "events_repeated": "repeated",
    "events_erased": "erased",
}
_TOTALS = {
    "rows_written": ("vql_stream_rows_written", "Rows put into the store."),
    "bytes_written": ("vql_stream_written_bytes", "Bytes of the rows put; over rows written, the bytes of a put."),
    "conflicts": ("vql_stream_put_conflicts", "Puts that the fence refused, and that were redone."),
    "retries": ("vql_stream_store_retries", "Calls that were made again because the store did not answer."),
    "cache_hits": ("vql_stream_row_cache_hits", "Rows found in the worker's own cache."),
    "cache_misses": ("vql_stream_row_cache_misses", "Rows that had to be read from the store."),
}


class _Broker(msgspec.Struct):
    state: str = ""
    rtt: dict[str, float] = {}


class _Partition(msgspec.Struct):
    fetchq_cnt: int = 0
    consumer_lag: int = -1


class _Topic(msgspec.Struct):
    partitions: dict[str, _Partition] = {}


class _ClientStatistics(msgspec.Struct):
    """The few fields that are wanted of librdkafka's statistics."""

    rx_bytes: int = 0
    brokers: dict[str, _Broker] = {}
    topics: dict[str, _Topic] = {}


@dataclass(slots=True)
class PartitionProgress:
    """Where the stream is in one partition. Offsets are those of the last record; times are wall-clock seconds."""

    started_s: float
    in_rows: int
    log_end: int | None = None
    newest_s: float | None = None
    at_end_s: float | None = None
    put_once: bool = False
    on_their_way: deque[tuple[int, np.ndarray]] = field(default_factory=deque)

    @property
    def lag_events(self) -> int | None:
        """None before the log's end is known."""
        return None if self.log_end is None else max(0, self.log_end - self.in_rows)

    def lag_s(self, now_s: float) -> float:
        if self.lag_events == 0:
            return 0.0
        whole_at = [at for at in (self.newest_s, self.at_end_s) if at is not None]
        return max(0.0, now_s - (max(whole_at) if whole_at else self.started_s))

    @property
    def ready(self) -> bool:
        return self.put_once or self.lag_events == 0


@dataclass(slots=True)
class _Histogram:
    """Counts by bucket, filled a batch at a time: one call an event would cost more than to fold it."""

    bounds: np.ndarray
    count_B: np.ndarray = field(init=False)
    sum: float = 0.0

    def __post_init__(self) -> None:
        self.count_B = np.zeros(len(self.bounds) + 1, np.int64)

    def observe(self, value_N: np.ndarray) -> None:
        self.count_B += np.bincount(np.searchsorted(self.bounds, value_N), minlength=len(self.count_B))
        self.sum += float(value_N.sum())

    def family(self, name: str, words: str) -> Metric:
        bounds = [*map(str, self.bounds), "+Inf"]
        cumulative = np.cumsum(self.count_B).tolist()
        return HistogramMetricFamily(
            name, words, buckets=list(zip(bounds, cumulative, strict=True)), sum_value=self.sum
        )


class StreamMetrics:
    """The figures of this process. Its methods are called by the steps and may be called by several threads."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self.registry = CollectorRegistry()
        self.partitions: dict[int, PartitionProgress] = {}
        self.last_commit_s: float | None = None
        # Wall-clock and CPU seconds of this process.
        self._first_taken: tuple[float, float] | None = None
        self._last_put: tuple[float, float] | None = None
        self._clock = clock
        self._visible = _Histogram(np.array(VISIBLE_BUCKETS_S))
        self._row_bytes = _Histogram(np.array(ROW_BYTES_BUCKETS))
        self._kafka: dict[int, _ClientStatistics] = {}
        made: dict[str, Any] = {"registry": self.registry}
        self._events = Counter("vql_stream_events", "Records by what became of them.", ["outcome"], **made)
        self._letters = Counter("vql_stream_dead_letters", "Records that are no events.", ["reason"], **made)
        self._unknown = Counter("vql_stream_unknown", "Events of unknown items and actions.", ["what"], **made)
        self._totals = {name: Counter(metric, words, **made) for name, (metric, words) in _TOTALS.items()}
        # So that a rate over them has a start, and an alert on them a value.
        for outcome in (*_OUTCOMES.values(), "dead_letter"):
            self._events.labels(outcome)
        for what in ("item", "action"):
            self._unknown.labels(what)
        self.registry.register(self)

    def begin(self, after_offsets: Mapping[int, int]) -> None:
        """A stream starts at these positions; the counters of an earlier one in this process go on."""
        now_s = self._clock()
        self.partitions = {p: PartitionProgress(started_s=now_s, in_rows=at) for p, at in after_offsets.items()}
        self.last_commit_s = self._first_taken = self._last_put = None

    def log_end(self, partition: int, offset: int) -> None:
        """The log's last offset as a reader sees it."""
        if (progress := self.partitions.get(partition)) is not None:
            progress.log_end = offset
            self._note_end(progress)

    def begun(self) -> None:
        """Records are here, and work on them begins."""
        if self._first_taken is None:
            self._first_taken = (self._clock(), time.process_time())

    def observe(self, counts: Any) -> None:
        """Add what an update did (UpdateCounts)."""
        self._row_bytes.observe(np.array(counts.row_bytes))
        for name, outcome in _OUTCOMES.items():
            self._events.labels(outcome).inc(getattr(counts, name))
        for name, total in self._totals.items():
            total.inc(getattr(counts, name))

    def taken(self, partition: int, offset_N: np.ndarray, log_time_ms_N: np.ndarray) -> None:
        """Events of one partition are on their way: their offsets and times in the log, -1 where unknown.

        Remembered here until `put`, so that the steps between need not carry what only the figures want: they are
        fused, and a partition is read and put by one process, in order.
        """
        if (progress := self.partitions.get(partition)) is not None and len(offset_N):
            progress.on_their_way.append((int(offset_N[-1]), log_time_ms_N))

    def put(self, partition: int) -> None:
        """What was taken of this partition is in the rows now."""
        if (progress := self.partitions.get(partition)) is None:
            return
        now_s, progress.put_once = self._clock(), True
        self._last_put = (now_s, time.process_time())
        while progress.on_their_way:
            last_offset, log_time_ms_N = progress.on_their_way.popleft()
            progress.in_rows = max(progress.in_rows, last_offset)
            known_s_N = log_time_ms_N[log_time_ms_N >= 0] / 1000.0
            self._visible.observe(np.maximum(now_s - known_s_N, 0.0))
            if len(known_s_N):
                progress.newest_s = max(float(known_s_N.max()), progress.newest_s or 0.0)
        self._note_end(progress)

    def busy(self) -> tuple[float, float]:
        """Wall-clock and CPU seconds from the first record that was here to the last put: no start-up, no end."""
        if self._first_taken is None or self._last_put is None:
            return 0.0, 0.0
        (from_s, from_cpu_s), (to_s, to_cpu_s) = self._first_taken, self._last_put
        return to_s - from_s, to_cpu_s - from_cpu_s

    def encoded(self, unknown_items: int, unknown_actions: int) -> None:
        self._unknown.labels("item").inc(unknown_items)
        self._unknown.labels("action").inc(unknown_actions)

    def dead_letters(self, reasons: Iterable[str]) -> None:
        for reason in reasons:
            self._events.labels("dead_letter").inc()
            self._letters.labels(reason).inc()

    def committed(self, partition: int, offset: int) -> None:
        """A bundle is done: everything of the partition at or below the offset is in the rows or the dead letters."""
        self.last_commit_s = self._clock()
        if (progress := self.partitions.get(partition)) is not None:
            progress.in_rows = max(progress.in_rows, offset)
            self._note_end(progress)

    def kafka_statistics(self, partition: int, statistics: str) -> None:
        """What librdkafka's client of this partition says of itself (its JSON)."""
        self._kafka[partition] = msgspec.json.decode(statistics, type=_ClientStatistics)

    def collect(self) -> Iterable[Metric]:
        """Prometheus asks; ages and lags are as of now."""
        now_s, at = self._clock(), dict(self.partitions)
        yield self._visible.family("vql_stream_event_to_visible_seconds", "From the log's time to the put row.")
        yield self._row_bytes.family("vql_stream_row_bytes", "Size of the rows put, both parts.")
        yield _gauge("vql_stream_in_rows_offset", "Last offset in the rows.", {p: x.in_rows for p, x in at.items()})
        lags = {p: x.lag_events for p, x in at.items() if x.lag_events is not None}
        yield _gauge("vql_stream_lag_events", "Records of the log that are not in the rows.", lags)
        yield _gauge("vql_stream_lag_seconds", "How old the rows are.", {p: x.lag_s(now_s) for p, x in at.items()})
        last = GaugeMetricFamily("vql_stream_last_commit_timestamp_seconds", "Unix time of the last committed bundle.")
        if self.last_commit_s is not None:
            last.add_metric([], self.last_commit_s)
        yield last
        yield from self._of_kafka()

    def total(self, name: str, **labels: str) -> float:
        """A counter's value, for the status line; without labels, the sum over them."""
        found = [
            sample.value
            for family in self.registry.collect()
            for sample in family.samples
            if sample.name == name and labels.items() <= sample.labels.items()
        ]
        return sum(found)

    def _of_kafka(self) -> Iterable[Metric]:
        said = dict(self._kafka)
        received = CounterMetricFamily("vql_kafka_received_bytes", "Bytes from the brokers.", labels=["partition"])
        for partition, statistics in said.items():
            received.add_metric([str(partition)], statistics.rx_bytes)
        yield received
        own = {p: part for p, s in said.items() for t in s.topics.values() if (part := t.partitions.get(str(p)))}
        queued = {p: part.fetchq_cnt for p, part in own.items()}
        yield _gauge("vql_kafka_fetch_queue_records", "Records fetched and not read yet.", queued)
        lags = {p: part.consumer_lag for p, part in own.items() if part.consumer_lag >= 0}
        yield _gauge("vql_kafka_consumer_lag_events", "The client's own view of the lag.", lags)
        slow_s = {p: max((b.rtt.get("p99", 0) for b in s.brokers.values()), default=0) / 1e6 for p, s in said.items()}
        yield _gauge("vql_kafka_broker_rtt_p99_seconds", "Slowest broker's round trip.", slow_s)
        up = {p: sum(b.state == "UP" for b in s.brokers.values()) for p, s in said.items()}
        yield _gauge("vql_kafka_brokers_up", "Connections to brokers that stand.", up)

    def _note_end(self, progress: PartitionProgress) -> None:
        if progress.lag_events == 0:
            progress.at_end_s = self._clock()


@lru_cache(maxsize=1)
def process_metrics() -> StreamMetrics:
    """The metrics of this process."""
    return StreamMetrics()


def _gauge(name: str, words: str, values: Mapping[int, float]) -> Metric:
    family = GaugeMetricFamily(name, words, labels=["partition"])
    for partition, value in values.items():
        family.add_metric([str(partition)], value)
    return family
