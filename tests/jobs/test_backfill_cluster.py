"""A backfill on a real Spark standalone cluster: executors of little memory, a user of very many events, a kill."""

from __future__ import annotations

import os
import pty
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from zlib import crc32

import pytest

from feature_repo.handle import StoreHandle
from feature_repo.store import Backfill
from jobs.bench_backfill_sides import user_name, write_log
from jobs.bench_load import random_checkpoint
from jobs.local_cluster import SparkCluster, running_cluster
from jobs.parity import raw_users
from models.checkpoint import Checkpoint, Sizes
from models.row import decode_row, whole_cache
from tests.jobs.processes import kill
from tests.jobs.test_backfill import rows_in
from tests.jobs.test_backfill_task import assert_is_of

pytestmark = [pytest.mark.spark, pytest.mark.slow]

USERS, LENGTH, HEAVY = 3_000, 4, 1_000_000
EVENTS = USERS * LENGTH + HEAVY
NAMES = [user_name(n) for n in range(USERS + 1)]
CHECKED_USERS = 50


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SparkCluster]:
    with running_cluster(tmp_path_factory.mktemp("cluster"), memory_mb=512) as running:
        yield running


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return random_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", Sizes())


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("log")
    write_log(path / "events", USERS, LENGTH, heavy=HEAVY)
    return path


class Backfilling:
    """`vql backfill` on the cluster, with standard error on a terminal."""

    def __init__(self, cluster: SparkCluster, state: Path, **options: object) -> None:
        options |= {"state": state, "master": cluster.master}
        command = [sys.executable, "-m", "jobs.cli", "backfill"]
        command += [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
        self._shown: list[bytes] = []
        ours, theirs = pty.openpty()
        environment = os.environ | cluster.environment | {"COLUMNS": "160", "TERM": "xterm"}
        self.process = subprocess.Popen(
            command, cwd=state.parent, env=environment, stdout=subprocess.PIPE, stderr=theirs, text=True
        )
        os.close(theirs)
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    def _read(self, terminal: int) -> None:
        while True:
            try:
                self._shown.append(os.read(terminal, 65536))
            except OSError:  # the other end is closed
                os.close(terminal)
                return

    @property
    def shown(self) -> str:
        return b"".join(self._shown).decode(errors="replace")

    def ended(self) -> str:
        """What it printed, once it has ended well."""
        out, _ = self.process.communicate()
        self._reader.join()
        assert self.process.returncode == 0, self.shown
        return out

    def wait(self, reached) -> None:
        while not reached():
            assert self.process.poll() is None, self.shown
            time.sleep(0.05)


def assert_rows_of(log: Path, checkpoint: Checkpoint, state: Path, record: Backfill | None) -> None:
    """All users' rows hold all events; some users', and the heaviest's, are the fold of the raw ones."""
    assert record is not None
    assert (record.users, record.events, record.newer, record.revision) == (len(NAMES), EVENTS, 0, 0)
    stored = StoreHandle(state=state).open().get_rows(checkpoint.checkpoint_id, NAMES)
    rows = {name: decode_row(data, checkpoint.spec) for name, data in zip(NAMES, stored, strict=True) if data}
    assert sum(row.count for row in rows.values()) == EVENTS
    using, checked = checkpoint.fold(), 0
    for user_id, events in raw_users(log):
        if user_id == NAMES[-1] or crc32(user_id.encode()) % (USERS // CHECKED_USERS) == 0:
            assert rows[user_id].count == len(events)
            assert_is_of(whole_cache(rows[user_id], using), events, checkpoint, using)
            checked += 1
    assert checked > 1


@pytest.mark.timeout(1200)
def test_a_user_of_a_million_events_fits_executors_of_half_a_gigabyte(
    cluster: SparkCluster, checkpoint: Checkpoint, log: Path, tmp_path: Path
) -> None:
    running = Backfilling(cluster, tmp_path / "state", checkpoint=checkpoint.path, log=log, puts_per_s=0)
    out = running.ended()
    assert f"{len(NAMES):,} rows with {EVENTS:,} events" in out
    assert re.search(rf"[\d,]+ of {EVENTS:,} events, [\d,]+ users", running.shown)
    assert "Stage" not in running.shown
    record = StoreHandle(state=tmp_path / "state").open().backfill(checkpoint.checkpoint_id)
    assert_rows_of(log, checkpoint, tmp_path / "state", record)


@pytest.mark.timeout(1200)
def test_an_executor_and_then_all_of_it_may_be_killed(
    cluster: SparkCluster, checkpoint: Checkpoint, log: Path, tmp_path: Path
) -> None:
    """An executor's task goes on elsewhere; a job that is killed as a whole puts the rest when it is repeated."""
    state, of = tmp_path / "state", {"checkpoint": checkpoint.path, "log": log}
    slow = Backfilling(cluster, state, **of, puts_per_s=200)
    slow.wait(lambda: rows_in(state) >= 100)
    victim = cluster.executors()[0]
    victim.kill()
    before = rows_in(state)
    slow.wait(lambda: rows_in(state) >= before + 500)
    kill(slow.process)
    written = written_ms(state)
    assert 600 <= len(written) < len(NAMES)
    assert StoreHandle(state=state).open().backfill(checkpoint.checkpoint_id) is None

    Backfilling(cluster, state, **of, puts_per_s=0).ended()

    assert_rows_of(log, checkpoint, state, StoreHandle(state=state).open().backfill(checkpoint.checkpoint_id))
    again = written_ms(state)
    assert {user_id: again[user_id] for user_id in written} == written


def written_ms(state: Path) -> dict[str, int]:
    """When each row was written."""
    connection = sqlite3.connect(f"file:{state / 'online.db'}?mode=ro", uri=True)
    try:
        return dict(connection.execute("SELECT user_id, written_ms FROM rows"))
    finally:
        connection.close()
