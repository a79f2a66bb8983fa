"""What a reader counts, for Prometheus: in a registry of its own, or in the serving process's.

The numbers are kept here and not in prometheus_client's counters: importing Feast switches those to files that all
registries of the process share.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, HistogramMetricFamily, Metric

BUCKETS_S = (0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)


class ReaderMetrics:
    """Counters of reads, and of users by what became of them. Safe to share between readers and threads.

    registry: where they are registered; None makes one, which a serving process can expose or register in its own.
    Raises ValueError (prometheus_client's) where the registry has them already: share the ReaderMetrics instead.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._turn = threading.Lock()
        self._reads = self._refused = self._unknown_items = 0
        self._users: Counter[str] = Counter()
        self._bucket_counts = [0] * (len(BUCKETS_S) + 1)
        self._seconds = 0.0
        self.registry.register(self)

    def read(self, users: Mapping[str, int], unknown_items: int, seconds: float) -> None:
        """A call that was answered; `users` counts them by outcome."""
        with self._turn:
            self._reads += 1
            # Not Counter.update, which asks what it is given, and takes longer than all of this.
            for outcome, count in users.items():
                self._users[outcome] += count
            self._unknown_items += unknown_items
            self._bucket_counts[bisect_left(BUCKETS_S, seconds)] += 1
            self._seconds += seconds

    def refuse(self) -> None:
        """A call that was not answered."""
        with self._turn:
            self._refused += 1

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        with self._turn:
            reads, refused, unknown_items = self._reads, self._refused, self._unknown_items
            users, seconds, counts = dict(self._users), self._seconds, list(self._bucket_counts)
        yield CounterMetricFamily("vql_reader_reads", "Calls that were answered.", reads)
        yield CounterMetricFamily(
            "vql_reader_refused", "Calls that were refused: the store is lost or not filled.", refused
        )
        by_outcome = CounterMetricFamily("vql_reader_users", "Users read, by what became of them.", labels=["outcome"])
        for outcome, count in users.items():
            by_outcome.add_metric([outcome], count)
        yield by_outcome
        yield CounterMetricFamily(
            "vql_reader_unknown_items", "Recent events whose item is not in the reader's table yet.", unknown_items
        )
        buckets = list(zip([*map(str, BUCKETS_S), "+Inf"], accumulate(counts), strict=True))
        yield HistogramMetricFamily(
            "vql_reader_read_seconds", "From the call to the tensors.", buckets=buckets, sum_value=seconds
        )

    describe = collect
