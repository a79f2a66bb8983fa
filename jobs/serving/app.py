"""The HTTP application: POST /rank, and /healthz, /readyz, /metrics for those who watch it.

/healthz, 200 or 503: nothing is stuck and the store is not lost, so a restart would not help. A store that is only
away is no reason to restart: its users are scored without history. /readyz: requests are welcome; not any more when
the process is about to end.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from typing import Annotated, Any

import structlog
from fastapi import Body, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.background import BackgroundTask
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, PlainTextResponse

from jobs.scoring import Asked
from jobs.serving.batches import Batcher, BusyError, Ranked
from jobs.serving.live import LOOK_EVERY_S, LiveScorer
from jobs.serving.messages import (
    ANSWER_EXAMPLE,
    ASKED_EXAMPLES,
    BODY_BYTES_MAX,
    Problem,
    RankAnswer,
    RankedUser,
    RankRequest,
    Timing,
    sentence,
)
from jobs.serving.metrics import ServeMetrics
from jobs.serving.shadow import Shadow
from models.errors import StoreError

STUCK_S = 30.0
_ABOUT = "Scores candidates by attention over each user's whole history, read from per-codeword caches."
_PROBLEMS: dict[int | str, dict[str, Any]] = {
    400: {"model": Problem, "description": "The body cannot be parsed as JSON."},
    413: {"model": Problem, "description": f"The body has more than {BODY_BYTES_MAX:,} bytes."},
    422: {"model": Problem, "description": "The request is not as in this schema."},
    503: {"model": Problem, "description": "Too many requests wait (try again elsewhere), or the store is lost."},
}


@dataclass(kw_only=True, slots=True)
class Serving:
    """What the application answers from.

    shadow: who is asked afterwards. draining: the process is about to end. store_error: why the store is lost.
    """

    live: LiveScorer
    batcher: Batcher
    metrics: ServeMetrics
    shadow: Shadow | None = None
    draining: bool = False
    store_error: str | None = None


def make_app(serving: Serving) -> FastAPI:
    """The application; while it runs, it follows the live checkpoint."""
    app = FastAPI(
        title="vql serve",
        description=_ABOUT,
        lifespan=lambda _: _following(serving),
        docs_url=None,
        redoc_url=None,
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(Exception, _failed)
    _add_ranking(app, serving)
    _add_watching(app, serving)
    return app


def _add_ranking(app: FastAPI, serving: Serving) -> None:
    @app.post(
        "/rank",
        response_model=RankAnswer,
        responses=_PROBLEMS | {200: {"content": {"application/json": {"example": ANSWER_EXAMPLE}}}},
        summary="Score candidates for users",
    )
    async def rank(asked: Annotated[RankRequest, Body(openapi_examples=ASKED_EXAMPLES)]) -> Response:
        start_s = time.monotonic()
        now_ms = int(time.time() * 1000) if asked.now_ms is None else asked.now_ms
        users = [Asked(user_id=user.user_id, item_ids=user.candidates, now_ms=now_ms) for user in asked.users]
        try:
            ranked = await serving.batcher.rank(users)
        except BusyError:
            return _problem(503, "too many users wait to be scored; try again, or elsewhere", {"Retry-After": "1"})
        except StoreError as error:
            serving.store_error = str(error)
            return _problem(503, f"the online store is lost: {error}")
        serving.store_error = None
        serving.metrics.answered(ranked, time.monotonic() - start_s)
        # Run when the answer is sent.
        after = None if serving.shadow is None else BackgroundTask(_offer, serving.shadow, users, ranked)
        body = _answer(asked, now_ms, ranked).model_dump_json()
        return Response(body, media_type="application/json", background=after)


def _add_watching(app: FastAPI, serving: Serving) -> None:
    @app.get("/healthz", summary="Whether a restart would not help", responses={503: {}})
    async def healthz() -> Response:
        stuck = serving.batcher.longest_work_s > STUCK_S
        return _said(
            not stuck and serving.store_error is None,
            longest_work_s=round(serving.batcher.longest_work_s, 1),
            store=serving.store_error or "not lost",
            **_checkpoint(serving),
        )

    @app.get("/readyz", summary="Whether requests are welcome", responses={503: {}})
    async def readyz() -> Response:
        return _said(not serving.draining, draining=serving.draining, **_checkpoint(serving))

    @app.get("/metrics", summary="Metrics for Prometheus", response_class=PlainTextResponse)
    async def metrics() -> Response:
        serving.metrics.waiting.set(serving.batcher.waiting_users)
        return Response(generate_latest(serving.metrics.registry), media_type=CONTENT_TYPE_LATEST)


@asynccontextmanager
async def _following(serving: Serving) -> AsyncIterator[None]:
    """While the application runs, swap to what is live; at its end, answer what waits."""
    following = asyncio.create_task(_follow(serving))
    try:
        yield
    finally:
        following.cancel()
        with suppress(asyncio.CancelledError):
            await following
        await serving.batcher.close()
        if serving.shadow is not None:
            await asyncio.to_thread(serving.shadow.close)


async def _follow(serving: Serving) -> None:
    live, metrics = serving.live, serving.metrics
    metrics.went_live(live.scorer.checkpoint_id)
    while True:
        await asyncio.sleep(LOOK_EVERY_S)
        try:
            if await asyncio.to_thread(live.look):
                metrics.went_live(live.scorer.checkpoint_id)
                metrics.swaps.inc()
        except Exception:
            structlog.get_logger().exception("the live checkpoint could not be looked at")
        metrics.unusable.set(live.problem is not None)


def _answer(asked: RankRequest, now_ms: int, ranked: Ranked) -> RankAnswer:
    users = [
        RankedUser(user_id=one.user_id, scores=user.scores, history=user.history, unknown_candidates=user.unknown)
        for one, user in zip(asked.users, ranked.users, strict=True)
    ]
    timing = Timing(
        wait_ms=_ms(ranked.wait_s),
        read_ms=_ms(ranked.read_s),
        score_ms=_ms(ranked.score_s),
        batch_users=ranked.batch_users,
    )
    return RankAnswer(checkpoint_id=ranked.checkpoint_id, now_ms=now_ms, users=users, timing=timing)


async def _offer(shadow: Shadow, users: Sequence[Asked], ranked: Ranked) -> None:
    shadow.offer(users, ranked)


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)


def _checkpoint(serving: Serving) -> dict[str, Any]:
    live = serving.live
    return {"checkpoint_id": live.scorer.checkpoint_id, "checkpoint_problem": live.problem}


def _said(ok: bool, **facts: Any) -> Response:
    return JSONResponse({"ok": ok} | facts, 200 if ok else 503)


def _problem(status: int, error: str, headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": error}, status, headers)


async def _invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _problem(422, sentence(error))


async def _refused(request: Request, error: Exception) -> Response:
    """What the framework refuses: an unknown path or method, a body that is too large or cannot be parsed at all."""
    assert isinstance(error, HTTPException)
    if error.status_code == 413:
        return _problem(413, f"the body has more than {BODY_BYTES_MAX:,} bytes; send several requests")
    said = {404: "there is POST /rank; see /openapi.json", 400: "the body cannot be parsed as JSON"}
    return _problem(error.status_code, said.get(error.status_code, error.detail), dict(error.headers or {}))


async def _failed(_: Request, __: Exception) -> Response:
    """The server logs the exception itself."""
    return _problem(500, "this is a fault of the program; its log says more")
