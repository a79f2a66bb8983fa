"""A store that is away for a moment: waited for, given up in the end, and never made to lose an event."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from feature_repo.patient_rows import PatientRows
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowPut
from models.checkpoint import Checkpoint
from models.errors import StoreError, UnavailableError
from models.row import RowBytes
from pipelines.update import update_rows
from tests.pipelines.small_log import assert_rows_equal, plain_rows, read_rows
from tests.pipelines.test_update import USERS, batch
from tests.redis_server import PERSISTENT, running_redis
from tests.small import random_events, small_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "c")


class Falters(SqliteRows):
    """Of three calls, the first `away` fail; every other failing put was done, and only its answer lost."""

    calls = 0
    away = 2
    error: StoreError = UnavailableError("gone")

    def _answer(self) -> bool:
        self.calls += 1
        return (self.calls - 1) % 3 >= self.away

    def get_rows(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[RowBytes | None]:
        if not self._answer():
            raise self.error
        return super().get_rows(checkpoint_id, user_ids)

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        if self._answer():
            return super().put_rows(checkpoint_id, puts)
        if self.calls % 2:
            super().put_rows(checkpoint_id, puts)
        raise self.error


def test_calls_are_made_again_until_they_are_answered_and_nothing_counts_twice(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    events, away = random_events(300), Falters(tmp_path / "rows.db")
    rows = PatientRows(away, threading.Event())

    counts = [
        update_rows(rows, checkpoint.fold(), batch(checkpoint, events[at : at + 50], at)) for at in range(0, 300, 50)
    ]

    assert sum(c.events_folded + c.events_skipped for c in counts) == 300
    assert rows.retries == 2 * away.calls // 3
    assert sum(c.conflicts for c in counts) > 0
    assert_rows_equal(read_rows(SqliteRows(away.path), checkpoint, USERS), plain_rows(checkpoint, events, partitions=1))


def test_a_store_that_stays_away_is_an_error_after_the_deadline(checkpoint: Checkpoint, tmp_path: Path) -> None:
    away = Falters(tmp_path / "rows.db")
    away.away = 3
    with pytest.raises(UnavailableError, match="gone"):
        PatientRows(away, threading.Event(), deadline_s=0.3).get_rows(checkpoint.checkpoint_id, ["u"])
    assert away.calls > 1


def test_what_waiting_does_not_heal_is_an_error_at_once(checkpoint: Checkpoint, tmp_path: Path) -> None:
    away = Falters(tmp_path / "rows.db")
    away.error = StoreError("emptied")
    with pytest.raises(StoreError, match="emptied"):
        PatientRows(away, threading.Event()).get_rows(checkpoint.checkpoint_id, ["u"])
    assert away.calls == 1


def test_a_stream_that_is_told_to_stop_does_not_wait(checkpoint: Checkpoint, tmp_path: Path) -> None:
    away, stop = Falters(tmp_path / "rows.db"), threading.Event()
    away.away = 3
    threading.Timer(0.3, stop.set).start()
    began_s = time.monotonic()
    with pytest.raises(UnavailableError):
        PatientRows(away, stop).get_rows(checkpoint.checkpoint_id, ["u"])
    assert time.monotonic() - began_s < 30


def test_a_redis_server_that_crashes_and_comes_back_is_waited_for(checkpoint: Checkpoint, tmp_path: Path) -> None:
    events = random_events(300)
    with running_redis(tmp_path, PERSISTENT) as server:
        real = RedisRows(RedisSettings(url=server.url, timeout_s=1.0, retries=0))
        rows = PatientRows(real, threading.Event())
        update_rows(rows, checkpoint.fold(), batch(checkpoint, events[:100]))
        server.kill()
        comes_back = threading.Timer(1.0, server.start)
        comes_back.start()

        update_rows(rows, checkpoint.fold(), batch(checkpoint, events[100:], 100))

        comes_back.join()
        assert rows.retries > 0
        assert_rows_equal(read_rows(real, checkpoint, USERS), plain_rows(checkpoint, events, partitions=1))
        real.close()
