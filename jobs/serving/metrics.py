"""What the ranking worker counts and measures, for Prometheus."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from jobs.scoring import Scores
from jobs.serving.batches import Ranked

SECONDS = (0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0)
BATCH_USERS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0)
CORRELATIONS = (-0.5, 0.0, 0.25, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1.0)


class ServeMetrics:
    """One per process, in a registry of its own."""

    def __init__(self) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("vql_rank_requests", "Requests to rank, by HTTP status.", ["status"], registry=registry)
        self._users = Counter(
            "vql_rank_users", "Users scored, by what they were scored from.", ["history"], registry=registry
        )
        self._candidates = Counter(
            "vql_rank_candidates",
            "Candidates scored, by whether the checkpoint knows them.",
            ["known"],
            registry=registry,
        )
        self._seconds = Histogram(
            "vql_rank_seconds",
            "Of each request: waiting, reading caches and scoring (both of its batch), all in the server.",
            ["stage"],
            buckets=SECONDS,
            registry=registry,
        )
        self._batch_users = Histogram(
            "vql_rank_batch_users", "Users of the batch of each request.", buckets=BATCH_USERS, registry=registry
        )
        self.waiting = Gauge("vql_rank_waiting_users", "Users that wait for a batch.", registry=registry)
        self.swaps = Counter(
            "vql_rank_checkpoint_swaps", "Times that another checkpoint or item table went live.", registry=registry
        )
        self.unusable = Gauge(
            "vql_rank_checkpoint_unusable", "1 while the live path names what cannot be loaded.", registry=registry
        )
        self.shadow_requests = Counter(
            "vql_shadow_requests", "Requests for the shadow, by what became of them.", ["outcome"], registry=registry
        )
        self._shadow_users = Counter(
            "vql_shadow_users",
            "Users scored by the shadow, by what they were scored from.",
            ["history"],
            registry=registry,
        )
        self._shadow_seconds = Histogram(
            "vql_shadow_seconds", "The shadow's reading and scoring of a request.", buckets=SECONDS, registry=registry
        )
        self._shadow_correlation = Histogram(
            "vql_shadow_rank_correlation",
            "Spearman's, of the live scores of a user's candidates and the shadow's.",
            buckets=CORRELATIONS,
            registry=registry,
        )
        self._live = _LiveCheckpoint()
        registry.register(self._live)

    def went_live(self, checkpoint_id: str) -> None:
        self._live.checkpoint_id = checkpoint_id

    def answered(self, ranked: Ranked, total_s: float) -> None:
        """A request with an answer."""
        for history, users in Counts(user.history for user in ranked.users).items():
            self._users.labels(history).inc(users)
        unknown = sum(len(user.unknown) for user in ranked.users)
        self._candidates.labels("no").inc(unknown)
        self._candidates.labels("yes").inc(sum(len(user.scores) for user in ranked.users) - unknown)
        stages = {"wait": ranked.wait_s, "read": ranked.read_s, "score": ranked.score_s, "total": total_s}
        for stage, seconds in stages.items():
            self._seconds.labels(stage).observe(seconds)
        self._batch_users.observe(ranked.batch_users)

    def shadowed(self, scores: Scores, seconds: float, correlations: Sequence[float]) -> None:
        """A request that the shadow was asked too; a correlation for each user with candidates to put in order."""
        for history, users in Counts(user.history for user in scores.users).items():
            self._shadow_users.labels(history).inc(users)
        self._shadow_seconds.observe(seconds)
        for correlation in correlations:
            self._shadow_correlation.observe(correlation)
        self.shadow_requests.labels("scored").inc()


class _LiveCheckpoint(Collector):
    """A gauge with one label at a time: prometheus_client's own keeps the old ones where processes share its files."""

    checkpoint_id = ""

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily("vql_rank_checkpoint_info", "1 for the live checkpoint.", labels=["checkpoint_id"])
        info.add_metric([self.checkpoint_id], 1)
        yield info
