"""Requests that are there at the same time are scored as one batch: one read of the store, one pass of the model.

A batch begins when it has enough users, or its oldest request has waited long enough, and a thread is free. While one
is scored, requests gather for the next. A request is never divided, so one checkpoint answers all of it.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from jobs.scoring import Asked, Scored, Scores
from models.errors import StoreError


class BusyError(Exception):
    """More users wait than are to wait: better to say so at once than to answer late."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchRules:
    """A batch has at most users_max users (a larger request is one by itself), and waits at most wait_s for them.

    waiting_max: users that may wait, all requests together. at_once: batches in work, each in a thread of its own.
    """

    users_max: int = 32
    wait_s: float = 0.0
    waiting_max: int = 2048
    at_once: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranked:
    """A request's users in order, by one checkpoint; seconds it waited, and those of its batch, of batch_users."""

    checkpoint_id: str
    users: list[Scored]
    wait_s: float
    read_s: float
    score_s: float
    batch_users: int


@dataclass(frozen=True, kw_only=True, slots=True)
class _Waiting:
    users: Sequence[Asked]
    since_s: float
    ranked: asyncio.Future[Ranked]


class Batcher:
    """Belongs to the event loop in which `rank` is called; `score` runs in threads."""

    def __init__(self, score: Callable[[Sequence[Asked]], Scores], rules: BatchRules) -> None:
        self._score, self._rules = score, rules
        self._waiting: deque[_Waiting] = deque()
        self._threads = ThreadPoolExecutor(rules.at_once, thread_name_prefix="score")
        self._in_work: dict[asyncio.Future[None], float] = {}
        self._alarm: asyncio.TimerHandle | None = None
        self.waiting_users = 0

    async def rank(self, users: Sequence[Asked]) -> Ranked:
        """Raises BusyError when too many wait, StoreError for a lost store."""
        if self.waiting_users and self.waiting_users + len(users) > self._rules.waiting_max:
            raise BusyError
        loop = asyncio.get_running_loop()
        waiting = _Waiting(users=users, since_s=time.monotonic(), ranked=loop.create_future())
        self._waiting.append(waiting)
        self.waiting_users += len(users)
        self._begin_what_is_due()
        return await waiting.ranked

    @property
    def longest_work_s(self) -> float:
        """How long the oldest batch has been in work; 0 where none is."""
        return max((time.monotonic() - start_s for start_s in self._in_work.values()), default=0.0)

    async def close(self) -> None:
        """When all are answered."""
        while self._in_work or self._waiting:
            await asyncio.sleep(0.01)
        self._threads.shutdown()

    def _begin_what_is_due(self) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
            self._alarm = None
        while self._waiting and len(self._in_work) < self._rules.at_once:
            due_s = self._waiting[0].since_s + self._rules.wait_s - time.monotonic()
            if self.waiting_users < self._rules.users_max and due_s > 0:
                self._alarm = asyncio.get_running_loop().call_later(due_s, self._begin_what_is_due)
                return
            work = asyncio.ensure_future(self._answer(self._next_batch()))
            self._in_work[work] = time.monotonic()
            work.add_done_callback(self._done)

    def _done(self, work: asyncio.Future[None]) -> None:
        del self._in_work[work]
        self._begin_what_is_due()

    def _next_batch(self) -> list[_Waiting]:
        batch = [self._waiting.popleft()]
        users = len(batch[0].users)
        while self._waiting and users + len(self._waiting[0].users) <= self._rules.users_max:
            users += len(self._waiting[0].users)
            batch.append(self._waiting.popleft())
        self.waiting_users -= users
        return batch

    async def _answer(self, batch: list[_Waiting]) -> None:
        ranked = await asyncio.get_running_loop().run_in_executor(self._threads, self._rank, batch)
        for waiting, result in zip(batch, ranked, strict=True):
            if waiting.ranked.done():
                continue
            if isinstance(result, Exception):
                waiting.ranked.set_exception(result)
            else:
                waiting.ranked.set_result(result)

    def _rank(self, batch: Sequence[_Waiting]) -> list[Ranked | Exception]:
        """Each request's answer, in a thread. What one request does to the scorer must not reach the others."""
        start_s = time.monotonic()
        try:
            scores = self._score([user for waiting in batch for user in waiting.users])
        except StoreError as error:
            return [error] * len(batch)
        except Exception as error:
            return [error] if len(batch) == 1 else [result for waiting in batch for result in self._rank([waiting])]
        users = iter(scores.users)
        return [
            Ranked(
                checkpoint_id=scores.checkpoint_id,
                users=[next(users) for _ in waiting.users],
                wait_s=start_s - waiting.since_s,
                read_s=scores.read_s,
                score_s=scores.score_s,
                batch_users=len(scores.users),
            )
            for waiting in batch
        ]
