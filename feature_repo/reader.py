"""What a ranker calls: user ids in, a dense batch of caches out, in one read of the store and within a deadline.

The bytes of all rows are checked where they lie, and scattered into tensors with the recent events folded in by one
compiled call (`models.dense_caches`). A user whose row is absent (or expired), damaged, or another checkpoint's is
masked, for a reason that is named and counted; the others do not notice.

A store that is slower than the deadline, or away, makes no error: users get the rows that were read last, flagged, or
are masked as "late". A store that is lost is another matter: empty, it would make every user new. It is refused until
it holds a backfill or committed positions, and what was read from the lost one is forgotten.

`read` asks the store in the caller's own thread for as long as that is sure to end by the deadline. What has to
connect, or is late, goes on in another thread, so that a late answer is at least kept. `read_async` has a
thread do all.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch

from feature_repo.filling import Filling
from feature_repo.kept_rows import Found, KeptRows
from feature_repo.opened import Opened
from feature_repo.reader_metrics import ReaderMetrics
from feature_repo.store import RowStore, require_filled, run_out
from models.attention import CacheBatch
from models.checkpoint import Checkpoint
from models.dense_caches import DenseBatch, DenseCaches, compile_kernels
from models.errors import ForeignRowError, StoreError, UnavailableError, WireError
from models.row import Fold, Row, RowBytes, decode_row
from models.row_places import ABSENT as NO_ROW
from models.row_places import DAMAGED as BAD_ROW
from models.row_places import FOREIGN as FOREIGN_ROW
from models.row_places import SOUND

FRESH = "fresh"
# A store that is late again within this time is late still, and not news.
LATE_NEWS_S = 10.0
ABSENT, DAMAGED, FOREIGN, LATE = "absent", "damaged", "foreign", "late"
REGRESSED = "regressed"
_log = logging.getLogger(__name__)
_REASONS = {NO_ROW: ABSENT, BAD_ROW: DAMAGED, FOREIGN_ROW: FOREIGN}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadLimits:
    """deadline_s: how long a call waits for the store's rows, as tensors. None: as long as the store's settings let
    it, and a store that is away is an UnavailableError: so tools have it, which would rather fail than miss a user.

    kept_bytes, kept_s: of the rows read last. waiting_max: calls that may wait for the store at once, those that were
    given up included; beyond, a call is late at once. fillers: threads, shared by all calls, that make tensors of rows
    while a call's thread receives the next.
    """

    deadline_s: float | None = None
    kept_bytes: int = 256 << 20
    kept_s: float = 300.0
    waiting_max: int = 64
    fillers: int = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class Read:
    """The caches in the order asked for; why some users have none, and why some have the row that was read last.

    missing: "absent", "damaged", "foreign" or "late". stale: "late", or "regressed" where the store's row was older.
    unknown_items counts recent events whose item the reader's table does not hold yet; they were read as the unknown
    item. rows: what the caches are made from, where it was received: one that is asked for is copied.
    """

    caches: CacheBatch
    missing: dict[str, str]
    stale: dict[str, str] = field(default_factory=dict)
    unknown_items: int = 0
    rows: Sequence[RowBytes | None] = ()

    def outcome(self, user_id: str) -> str:
        """FRESH, the reason why the user has no cache, or "stale_" and why it is the row that was read last."""
        if not self.missing and not self.stale:
            return FRESH
        if user_id in self.stale:
            return f"stale_{self.stale[user_id]}"
        return self.missing.get(user_id, FRESH)


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fetched:
    """Caches, and which users have one that is not the store's; `absent` says what having none means."""

    status_B: np.ndarray
    dense: DenseCaches
    rows: Sequence[RowBytes | None]
    stale: dict[str, str]
    absent: str = ABSENT


class Reader:
    """Reads the caches of one checkpoint from a store of its own. Safe to share between threads; not after a fork.

    Its calls raise StoreError while the store is lost or not filled, UnavailableError only without a deadline, and
    InputError for a user id that is not Unicode text.
    """

    def __init__(
        self,
        rows: RowStore,
        opened: Opened,
        limits: ReadLimits = ReadLimits(),
        device: torch.device | str = "cpu",
        metrics: ReaderMetrics | None = None,
    ) -> None:
        self.rows, self.limits, self.device = rows, limits, torch.device(device)
        self.metrics = ReaderMetrics() if metrics is None else metrics
        self._opened = opened
        self._kept = KeptRows(limits.kept_bytes, limits.kept_s)
        self._threads = ThreadPoolExecutor(limits.waiting_max + 1, thread_name_prefix="vql-reader")
        self._waiting = threading.Semaphore(limits.waiting_max)
        self._fillers = ThreadPoolExecutor(limits.fillers, thread_name_prefix="vql-filler")
        self._begun = False
        self._refusal: StoreError | None = None
        self._late_s = -LATE_NEWS_S
        # The first read is not to miss its deadline for it.
        compile_kernels(opened.loaded)

    @property
    def checkpoint(self) -> Checkpoint:
        return self._opened.checkpoint

    @property
    def fold(self) -> Fold:
        """With the item table as it was loaded last."""
        return self._opened.loaded

    def read(self, user_ids: Sequence[str]) -> Read:
        """The caches of these users, recent events folded in."""
        started_s, fetched = time.perf_counter(), None
        with self._lateness():
            if self.limits.deadline_s is None:
                fetched = run_out(self._fetch(user_ids))
            elif self._waiting.acquire(blocking=False):
                fetched = self._fetch_in_time(user_ids, time.monotonic() + self.limits.deadline_s)
        return self._answer(user_ids, fetched, started_s)

    async def read_async(self, user_ids: Sequence[str]) -> Read:
        """`read` for an event loop, which is free meanwhile."""
        started_s, fetched = time.perf_counter(), None
        with self._lateness():
            if self._waiting.acquire(blocking=False):
                asked = self._hand_over(self._fetch(list(user_ids)))
                fetched = await asyncio.wait_for(asyncio.wrap_future(asked), self.limits.deadline_s)
        return self._answer(user_ids, fetched, started_s)

    def read_rows(self, user_ids: Sequence[str]) -> tuple[list[Row | None], dict[str, str]]:
        """The rows as stored (folded part and recent events), and the reason for each user who has none. For tools."""
        rows: list[Row | None] = []
        missing: dict[str, str] = {}
        stored = self.rows.get_rows(self.checkpoint.checkpoint_id, user_ids)
        for user_id, data in zip(user_ids, stored, strict=True):
            row, reason = _decoded(data, self.fold)
            rows.append(row)
            if reason is not None:
                missing[user_id] = reason
        return rows, missing

    def close(self) -> None:
        """Give the threads and the store's connections back."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._fillers.shutdown(wait=False)
        self.rows.close()

    @contextmanager
    def _lateness(self) -> Iterator[None]:
        """With a deadline, a store that is late or away is no error; one that is lost is counted, and is one."""
        try:
            yield
        except (TimeoutError, UnavailableError):
            if self.limits.deadline_s is None:
                raise
        except StoreError:
            self.metrics.refuse()
            raise

    def _fetch_in_time(self, user_ids: Sequence[str], until_s: float) -> _Fetched:
        """The caches, from this thread where that is sure not to take longer. Raises TimeoutError at until_s."""
        fetching, handed_over = self._fetch(list(user_ids), until_s), False
        try:
            next(fetching)
            handed_over = True
        except StopIteration as end:
            return end.value
        finally:
            if not handed_over:
                self._waiting.release()
        return self._hand_over(fetching).result(max(0.0, until_s - time.monotonic()))

    def _hand_over(self, fetching: Fetching) -> Future[_Fetched]:
        """Have a thread do the rest, one of those that may wait."""
        try:
            asked = self._threads.submit(run_out, fetching)
        except BaseException:
            self._waiting.release()
            raise
        asked.add_done_callback(lambda _: self._waiting.release())
        return asked

    def _fetch(self, user_ids: Sequence[str], until_s: float | None = None) -> Fetching:
        """The caches from the store's rows; yields as `RowStore.reading`.

        Who waited may have gone: then the rows are at least kept. The thread that receives rows makes their tensors,
        because its core has them in its cache.
        """
        using = self.fold
        filling = Filling(len(user_ids), lambda users: DenseBatch(users, using, self.device), self._fillers)
        found: Found | None = None

        def take(first: int, rows: Sequence[RowBytes | None]) -> None:
            nonlocal found
            filling.take(first, rows)
            if not rows and self.limits.deadline_s is not None:
                # The store is at work: later this would be waited for.
                found = self._kept.find(user_ids)

        try:
            if not self._begun:
                yield
                self.require_filled()
            yield from self.rows.reading(using.spec.checkpoint_id, user_ids, take, until_s)
        except UnavailableError:
            raise
        except StoreError as error:
            self._forget(error)
            raise
        rows, batch = filling.finish(), filling.batch
        behind = [] if self.limits.deadline_s is None else self._kept.renew(user_ids, rows, batch.place_B, found)
        if behind:
            for b, row in zip(behind, self._kept.get([user_ids[b] for b in behind]), strict=True):
                if row is not None:
                    batch.fill(b, [row])
        self._refusal = None
        return _fetched(batch, {user_ids[b]: REGRESSED for b in behind})

    def require_filled(self) -> None:
        """Raises as `feature_repo.store.require_filled`."""
        if self._begun:
            return
        require_filled(self.rows, self.checkpoint.checkpoint_id)
        self._begun = True

    def _forget(self, error: StoreError) -> None:
        """The store is another one than it was: nothing that was read before holds."""
        self._refusal, self._begun = error, False
        self._kept.clear()
        self.rows.close()

    def _answer(self, user_ids: Sequence[str], fetched: _Fetched | None, started_s: float) -> Read:
        if self._opened.due:
            self._threads.submit(self._opened.look)
        if fetched is None:
            fetched = self._last_read(user_ids)
        (caches, unknown_B), status_B = fetched.dense, fetched.status_B
        missing = {
            user_ids[b]: fetched.absent if status_B[b] == NO_ROW else _REASONS[int(status_B[b])]
            for b in np.flatnonzero(status_B != SOUND)
        }
        unknown_items = int(unknown_B.sum())
        read = Read(caches=caches, missing=missing, stale=fetched.stale, unknown_items=unknown_items, rows=fetched.rows)
        # As a rule all are fresh.
        outcomes = Counter(map(read.outcome, user_ids)) if missing or read.stale else {FRESH: len(user_ids)}
        self.metrics.read(outcomes, read.unknown_items, time.perf_counter() - started_s)
        return read

    def _last_read(self, user_ids: Sequence[str]) -> _Fetched:
        """What was read last of these users, for a store that is late. Raises what a late answer of it was, if lost."""
        if self._refusal is not None:
            self.metrics.refuse()
            raise StoreError(str(self._refusal))
        before_s, self._late_s = self._late_s, time.monotonic()
        if self._late_s - before_s >= LATE_NEWS_S:
            _log.warning("the online store is late: users are read from kept rows, or without history")
        rows = self._kept.get(user_ids)
        stale = {user_id: LATE for user_id, row in zip(user_ids, rows, strict=True) if row is not None}
        batch = DenseBatch(len(rows), self.fold, self.device)
        batch.fill(0, rows)
        return _fetched(batch, stale, LATE)


Fetching = Generator[None, None, _Fetched]


def _fetched(batch: DenseBatch, stale: dict[str, str], absent: str = ABSENT) -> _Fetched:
    return _Fetched(status_B=batch.place_B["status"], dense=batch.caches(), rows=batch.rows, stale=stale, absent=absent)


def _decoded(data: RowBytes | None, using: Fold) -> tuple[Row | None, str | None]:
    if data is None:
        return None, ABSENT
    try:
        return decode_row(data, using.spec), None
    except ForeignRowError:
        return None, FOREIGN
    except WireError:
        return None, DAMAGED
