"""What a reader counts, for Prometheus: in a registry of its own, or in the serving process's."""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Histogram

BUCKETS_S = (0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 1.0)


class ReaderMetrics:
    """Counters of reads, and of users by what became of them. Safe to share between readers and threads.

    registry: where they are registered; None makes one, which a serving process can expose or register in its own.
    Raises ValueError (prometheus_client's) where the registry has them already: share the ReaderMetrics instead.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._reads = Counter("vql_reader_reads", "Calls that were answered.", registry=self.registry)
        self._refused = Counter(
            "vql_reader_refused", "Calls that were refused: the store is lost or not filled.", registry=self.registry
        )
        self._users = Counter(
            "vql_reader_users", "Users read, by what became of them.", ["outcome"], registry=self.registry
        )
        self._unknown_items = Counter(
            "vql_reader_unknown_items",
            "Recent events whose item is not in the reader's table yet.",
            registry=self.registry,
        )
        self._seconds = Histogram(
            "vql_reader_read_seconds", "From the call to the tensors.", buckets=BUCKETS_S, registry=self.registry
        )

    def read(self, users: Mapping[str, int], unknown_items: int, seconds: float) -> None:
        """A call that was answered; `users` counts them by outcome."""
        self._reads.inc()
        self._seconds.observe(seconds)
        for outcome, count in users.items():
            self._users.labels(outcome).inc(count)
        if unknown_items:
            self._unknown_items.inc(unknown_items)

    def refuse(self) -> None:
        """A call that was not answered."""
        self._refused.inc()
