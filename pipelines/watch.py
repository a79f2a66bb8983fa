"""What the people and programs that watch a stream see: metrics over HTTP, and log lines or a live line of progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass

import structlog
from rich.console import Console
from rich.live import Live
from rich.text import Text

from pipelines.health import Health, served
from pipelines.metrics import StreamMetrics

PROGRESS_INTERVAL_S = 10.0
LIVE_INTERVAL_S = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Watch:
    """How a stream is watched. port: None for no metrics, 0 for a free port; live: a status line on the terminal.

    drain_s: how long a stream that is told to end may take for its last bundle.
    """

    host: str = "127.0.0.1"
    port: int | None = None
    live: bool = False
    drain_s: float = 30.0


UNWATCHED = Watch()


@dataclass(frozen=True, kw_only=True, slots=True)
class Status:
    """A moment of a stream, in the figures that one looks at first; None: not known yet."""

    events_per_s: int
    lag_events: int | None
    lag_s: float
    last_commit_age_s: float | None
    dead_letters: int

    def line(self) -> str:
        lag = "lag unknown" if self.lag_events is None else f"lag {self.lag_events:,} events, {self.lag_s:.1f} s"
        commit = "no commit yet" if self.last_commit_age_s is None else f"commit {self.last_commit_age_s:.1f} s ago"
        return f"{self.events_per_s:,} events/s   {lag}   {commit}   {self.dead_letters:,} dead letters"


class Pace:
    """Status after status: rates are over the time since the last one."""

    def __init__(self, metrics: StreamMetrics) -> None:
        self._metrics = metrics
        self._at_s, self._events = time.monotonic(), metrics.total("vql_stream_events_total")

    def status(self) -> Status:
        metrics, now_s = self._metrics, time.monotonic()
        events = metrics.total("vql_stream_events_total")
        rate = (events - self._events) / max(now_s - self._at_s, 1e-9)
        self._at_s, self._events = now_s, events
        partitions, wall_s, last_s = list(metrics.partitions.values()), time.time(), metrics.last_commit_s
        lags = [progress.lag_events for progress in partitions]
        return Status(
            events_per_s=round(rate),
            lag_events=None if None in lags else sum(lags),
            lag_s=round(max((progress.lag_s(wall_s) for progress in partitions), default=0.0), 1),
            last_commit_age_s=None if last_s is None else round(wall_s - last_s, 1),
            dead_letters=int(metrics.total("vql_stream_events_total", outcome="dead_letter")),
        )


@contextmanager
def watched(watch: Watch, health: Health) -> Iterator[None]:
    """Serve and show the stream while the context lasts. Raises InputError for a port that cannot be had."""
    with ExitStack() as stack:
        if watch.port is not None:
            port = stack.enter_context(served(health, watch.host, watch.port))
            structlog.get_logger().info("metrics served", host=watch.host, port=port)
        stack.enter_context(_live(health.metrics) if watch.live else _logged(health.metrics))
        yield


@contextmanager
def _live(metrics: StreamMetrics) -> Iterator[None]:
    """One line at the bottom of the terminal; log lines go by above it."""
    pace = Pace(metrics)
    console = Console(stderr=True)

    def line() -> Text:
        return Text(pace.status().line(), no_wrap=True, overflow="ellipsis")

    with Live(console=console, get_renderable=line, refresh_per_second=1 / LIVE_INTERVAL_S, transient=True):
        yield


@contextmanager
def _logged(metrics: StreamMetrics) -> Iterator[None]:
    """A log line every PROGRESS_INTERVAL_S."""
    ended, pace = threading.Event(), Pace(metrics)

    def report() -> None:
        while not ended.wait(PROGRESS_INTERVAL_S):
            structlog.get_logger().info("stream", **asdict(pace.status()))

    thread = threading.Thread(target=report, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
