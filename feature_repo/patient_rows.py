"""Rows of a store that may be away for a moment: calls are made again, and the writer waits meanwhile.

While a call waits, its bundle or task does, so nothing more is read: memory stays bounded and the log keeps the rest.
When the store stays away, or the writer is told to stop, the error goes on; the bundle or task fails and is repeated.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import structlog
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, stop_when_event_set
from tenacity.nap import sleep_using_event
from tenacity.wait import wait_random_exponential

from feature_repo.store import RowPut, RowStore
from models.errors import UnavailableError
from models.row import RowBytes
from models.wire import Stamp

DEADLINE_S = 300.0
WAIT_S_MAX = 5.0


class PatientRows:
    """The part of a RowStore that writers of rows need, tried again on UnavailableError for as long as `deadline_s`.

    `retries` counts the calls that were made again. `stop` ends the waiting at once.
    """

    def __init__(self, rows: RowStore, stop: threading.Event, deadline_s: float = DEADLINE_S) -> None:
        self._rows = rows
        self.retries = 0
        self._trying = Retrying(
            retry=retry_if_exception_type(UnavailableError),
            wait=wait_random_exponential(multiplier=0.1, max=WAIT_S_MAX),
            stop=stop_after_delay(deadline_s) | stop_when_event_set(stop),
            sleep=sleep_using_event(stop),
            before_sleep=self._again,
            reraise=True,
        )

    def get_rows(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[RowBytes | None]:
        return self._trying(self._rows.get_rows, checkpoint_id, user_ids)

    def get_stamps(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[Stamp | None]:
        return self._trying(self._rows.get_stamps, checkpoint_id, user_ids)

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        """What an earlier try has put already is refused, as if another writer had: the caller reads it again."""
        return self._trying(self._rows.put_rows, checkpoint_id, puts)

    def _again(self, state: RetryCallState) -> None:
        self.retries += 1
        error = state.outcome.exception() if state.outcome else None
        structlog.get_logger().warning(
            "the store does not answer",
            tries=state.attempt_number,
            again_in_s=round(state.upcoming_sleep, 2),
            error=str(error),
        )
