"""The process of `vql serve`: from the plan to a listening server, and its end.

SIGTERM ends it without losing a request. First it lingers: /readyz says 503, every answer closes its connection, and
new connections are still served, since balancers need a moment to look away. Then it listens no more, answers what it
has, and exits 0. A second signal ends it at once.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import structlog
import torch
import uvicorn
from fastapi import HTTPException
from prometheus_client import CollectorRegistry
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader, ReadLimits
from feature_repo.reader_metrics import ReaderMetrics
from jobs.scoring import Asked, Placement, Scorer, load_scorer
from jobs.serving.app import Serving, make_app
from jobs.serving.batches import Batcher, BatchRules
from jobs.serving.live import LiveScorer
from jobs.serving.messages import BODY_BYTES_MAX
from jobs.serving.metrics import ServeMetrics
from jobs.serving.shadow import Shadow, ShadowPlan
from models.checkpoint import open_checkpoint
from models.errors import InputError

if TYPE_CHECKING:
    from jobs.read_log import ReadLog

_WARM_CANDIDATES = (1, 100, 500)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Which share of the reads to log, where, and the key that hashes users."""

    path: Path
    share: float
    key: bytes = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class ServePlan:
    """What to serve, and where. linger_s, drain_s: after SIGTERM, until it stops to listen, and for what is left.

    sampling: None logs no reads.
    """

    checkpoint_path: Path
    store: StoreHandle
    host: str
    port: int
    rules: BatchRules
    placement: Placement
    limits: ReadLimits
    linger_s: float
    drain_s: float
    sampling: Sampling | None = None
    shadow: ShadowPlan | None = None


def run_server(plan: ServePlan) -> None:
    """Serve until a signal. Raises InputError for an address in use, CheckpointError without a first checkpoint."""
    # A batch is one thread's: threads that share one wait for each other at every operation, and a core that another
    # process takes for a moment then stops both.
    torch.set_num_threads(1)
    metrics = ServeMetrics()
    with _bound(plan.host, plan.port) as bound, _read_log(plan.sampling, metrics) as read_log:
        live = LiveScorer(plan.checkpoint_path, _loader(plan, ReaderMetrics(metrics.registry), read_log))
        batcher = Batcher(lambda asked: live.scorer.score(asked), plan.rules)
        shadow = None if plan.shadow is None else Shadow(plan.shadow, _shadow_loader(plan), metrics)
        serving = Serving(live=live, batcher=batcher, metrics=metrics, shadow=shadow)
        server = _Server(serving, plan)
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
        server.run(sockets=[bound])
    structlog.get_logger().info("server ended")


def _read_log(
    sampling: Sampling | None, metrics: ServeMetrics
) -> AbstractContextManager[ReadLog] | AbstractContextManager[None]:
    """Closed when the server has answered all."""
    if sampling is None:
        return nullcontext()
    from jobs.read_log import ReadLog, ReadLogMetrics

    return closing(ReadLog(sampling.path, sampling.share, sampling.key, metrics=ReadLogMetrics(metrics.registry)))


def _loader(plan: ServePlan, metrics: ReaderMetrics, read_log: ReadLog | None = None) -> Callable[[Path], Scorer]:
    def load(path: Path) -> Scorer:
        opened = Opened(open_checkpoint(path))
        reader = Reader(plan.store.open(), opened, plan.limits, plan.placement.device, metrics)
        scorer = load_scorer(opened.checkpoint, reader.fold, reader, plan.placement)
        _warm_up(scorer)
        # Only now: what warms it up is nobody's read.
        return replace(scorer, read_log=read_log)

    return load


def _shadow_loader(plan: ServePlan) -> Callable[[Path], Scorer]:
    """What its reader counts is not to be taken for the live one's, and it keeps no rows: nobody waits for it."""
    return _loader(replace(plan, limits=replace(plan.limits, kept_bytes=0)), ReaderMetrics(CollectorRegistry()))


def _warm_up(scorer: Scorer) -> None:
    """Buffers are made now, not in the first requests."""
    for candidates in _WARM_CANDIDATES:
        scorer.score([Asked(user_id="", item_ids=[""] * candidates, now_ms=0)] * 2)


def _bound(host: str, port: int) -> socket.socket:
    """The address, taken; nobody can connect before the server listens."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        raise InputError(f"cannot listen at {host}:{port}: {error}; name a free port, or 0") from error
    return bound


class _Server(uvicorn.Server):
    """Lingers at a signal, and does not die of it in the end, as uvicorn's own would."""

    def __init__(self, serving: Serving, plan: ServePlan) -> None:
        self._serving, self._linger_s = serving, plan.linger_s
        self._end_s: float | None = None
        super().__init__(
            uvicorn.Config(
                _edge(make_app(serving), serving),
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=plan.drain_s,  # type: ignore[arg-type]
            )
        )

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        for each in sockets or []:
            host, port = each.getsockname()[:2]
            checkpoint_id = self._serving.live.scorer.checkpoint_id
            structlog.get_logger().info("serving", host=host, port=port, checkpoint_id=checkpoint_id)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._end_s is not None:
            self.should_exit = self.force_exit = True
            return
        self._serving.draining = True
        self._end_s = time.monotonic() + self._linger_s

    async def on_tick(self, counter: int) -> bool:
        if self._end_s is not None and time.monotonic() >= self._end_s:
            self.should_exit = True
        return await super().on_tick(counter)


def _edge(app: ASGIApp, serving: Serving) -> ASGIApp:
    """Around all else: bodies are limited, answers of /rank counted, connections closed while the server drains."""

    async def edge(scope: Scope, receive: Receive, send: Send) -> None:
        taken_bytes = 0

        async def limited() -> Message:
            nonlocal taken_bytes
            message = await receive()
            taken_bytes += len(message.get("body", b""))
            if taken_bytes > BODY_BYTES_MAX:
                # Not by FastAPI's max_body_size, which answers for itself and not as its handlers would.
                raise HTTPException(413)
            return message

        async def seen(message: Message) -> None:
            if message["type"] == "http.response.start":
                if scope["path"] == "/rank":
                    serving.metrics.requests.labels(message["status"]).inc()
                if serving.draining:
                    message["headers"] = [*message.get("headers", []), (b"connection", b"close")]
            await send(message)

        await app(scope, limited, seen)

    return edge
