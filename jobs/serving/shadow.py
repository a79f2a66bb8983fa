"""A second checkpoint, asked a share of the requests after these were answered, and compared with the live one.

Nothing waits for it. What is to be asked lies in a short queue, and what does not fit is dropped and counted; one
thread asks, with a lower priority than those that answer. Its answers are compared and forgotten.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, Full, Queue
from zlib import crc32

import numpy as np
import structlog

from jobs.releases.states import State
from jobs.scoring import Asked, Scorer
from jobs.serving.batches import Ranked
from jobs.serving.live import LOOK_EVERY_S, LiveScorer, version_of
from jobs.serving.metrics import ServeMetrics
from models.errors import VqlError

WAITING_MAX = 64
NICE = 10
_BUCKETS = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowPlan:
    """path: a table of releases, whose newest in the state shadow it is, or a checkpoint as for the live one.

    share: of the requests, chosen by a hash of their first user, so that a user's are all of them or none.
    """

    path: Path
    share: float


class Shadow:
    """`offer` is safe to call from the event loop: it never waits. Ends with `close`."""

    def __init__(self, plan: ShadowPlan, load: Callable[[Path], Scorer], metrics: ServeMetrics) -> None:
        self._plan, self._load, self._metrics = plan, load, metrics
        self._queue: Queue[tuple[Sequence[Asked], Ranked] | None] = Queue(WAITING_MAX)
        self._live: LiveScorer | None = None
        self._problem = ""
        self._thread = threading.Thread(target=self._run, name="shadow", daemon=True)
        self._thread.start()

    def offer(self, asked: Sequence[Asked], ranked: Ranked) -> None:
        """A request and its answer, to be asked again if it is of the share."""
        if crc32(asked[0].user_id.encode()) % _BUCKETS >= self._plan.share * _BUCKETS:
            return
        try:
            self._queue.put_nowait((asked, ranked))
        except Full:
            self._metrics.shadow_requests.labels("dropped").inc()

    def close(self) -> None:
        """What waits is let go."""
        with suppress(Empty):
            while True:
                self._queue.get_nowait()
        self._queue.put(None)
        self._thread.join(timeout=10)

    def _run(self) -> None:
        # On Linux a thread has a priority of its own.
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        look_at_s = 0.0
        while True:
            if time.monotonic() >= look_at_s:
                self._look()
                look_at_s = time.monotonic() + LOOK_EVERY_S
            try:
                work = self._queue.get(timeout=LOOK_EVERY_S)
            except Empty:
                continue
            if work is None:
                return
            self._ask(*work)

    def _look(self) -> None:
        """Follow what is in shadow; where nothing is, or it cannot be used, ask nothing."""
        try:
            if self._live is None:
                live = LiveScorer(self._plan.path, self._load, State.SHADOW)
                live.scorer.reader.require_filled()
                self._live = live
            else:
                version_of(self._plan.path, State.SHADOW)
                self._live.look()
            self._problem = ""
        except (VqlError, OSError) as error:
            self._live = None
            if str(error) != self._problem:
                structlog.get_logger().info("no shadow is asked", reason=str(error))
            self._problem = str(error)

    def _ask(self, asked: Sequence[Asked], ranked: Ranked) -> None:
        scorer = None if self._live is None else self._live.scorer
        if scorer is None or scorer.checkpoint_id == ranked.checkpoint_id:
            return
        start_s = time.perf_counter()
        try:
            scores = scorer.score(asked)
            seconds = time.perf_counter() - start_s
            pairs = zip(ranked.users, scores.users, strict=True)
            found = [rank_correlation(live.scores, other.scores) for live, other in pairs if len(live.scores) > 1]
            self._metrics.shadowed(scores, seconds, found)
        except Exception as error:
            # Whatever it is, the live one is not concerned.
            self._metrics.shadow_requests.labels("failed").inc()
            structlog.get_logger().warning("the shadow could not be asked", error=str(error))


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's, of two scores of the same candidates: 1 for the same order, -1 for the opposite, 0 where one is flat.

    >>> rank_correlation([0.1, 0.5, 0.3], [1.0, 9.0, 2.0])
    1.0
    """
    one, other = (_ranks(scores) for scores in (first, second))
    size = np.sqrt((one @ one) * (other @ other))
    return round(float(one @ other / size), 9) if size else 0.0


def _ranks(scores: Sequence[float]) -> np.ndarray:
    """Places in order, equal scores sharing their mean one; less the mean of all."""
    _, which, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank = (np.cumsum(count) - (count - 1) / 2)[which]
    return rank - rank.mean()
