"""What is SQLite's own in the embedded store: files, forks, faults. What every store does is in the conformance."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from msgspec.structs import replace

from feature_repo import sqlite_store
from feature_repo.sqlite_statements import SCHEMA_VERSION
from feature_repo.sqlite_store import SqliteRows
from models.errors import InputError, MachineError, StoreError, UnavailableError
from tests.feature_repo.subjects import A, bytes_of, get, stamp, whole


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "online.db"


def open_and_put(path: Path, n: int) -> bool:
    return SqliteRows(path).put_rows(A, [whole(f"u{n}", stamp(n))])[0]


@pytest.mark.slow
def test_many_processes_may_create_the_file_at_once(path):
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        assert all(pool.starmap(open_and_put, [(path, n) for n in range(16)], chunksize=1))
    assert None not in SqliteRows(path).get_rows(A, [f"u{n}" for n in range(16)])


def test_many_threads_may_create_the_file_at_once(path):
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: open_and_put(path, n), range(16)))


def test_a_forked_child_and_its_parent_both_go_on(path):
    rows = SqliteRows(path)
    rows.put_rows(A, [whole("parent", stamp(1))])
    (inherited,) = rows._idle
    child = os.fork()
    if child == 0:
        ok = rows.put_rows(A, [whole("child", stamp(1))])[0] and get(rows, "parent") is not None
        os._exit(0 if ok and inherited not in rows._idle else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert rows.put_rows(A, [whole("parent", stamp(2))]) == [True]
    assert rows.get_rows(A, ["parent", "child"]) == [
        bytes_of(whole("parent", stamp(2))),
        bytes_of(whole("child", stamp(1))),
    ]


def test_a_pickled_copy_opens_the_same_file_with_the_same_options(path):
    rows = SqliteRows(path, ttl_s=5)
    rows.put_rows(A, [whole("u", stamp(1))])
    copy = pickle.loads(pickle.dumps(rows))
    assert (copy.path, copy.ttl_s) == (rows.path, 5)
    assert get(copy, "u") == bytes_of(whole("u", stamp(1)))


PUT_FOR_EVER = """
import sys
from feature_repo.sqlite_store import SqliteRows
from tests.feature_repo.subjects import A, stamp, whole
rows = SqliteRows(sys.argv[1])
for n in range(1_000_000):
    rows.put_rows(A, [whole(f"u{user}", stamp(n)) for user in range(20)])
    rows.commit_positions(A, 0, {0: n})
    print(n, flush=True)
"""


@pytest.mark.slow
def test_a_killed_writer_leaves_whole_batches_and_no_position_without_its_rows(path):
    command = [sys.executable, "-c", PUT_FOR_EVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as writer:
        for _ in range(20):
            writer.stdout.readline()
        writer.send_signal(signal.SIGKILL)
        said = [int(line) for line in writer.stdout.read().splitlines() if line]
    rows = SqliteRows(path)
    stored = {row.recent for row in rows.get_rows(A, [f"u{user}" for user in range(20)])}
    _, committed = rows.positions(A)[0]
    assert committed >= max(said, default=19)
    assert stored in ({whole("u", stamp(committed)).recent}, {whole("u", stamp(committed + 1)).recent})


def test_an_erased_users_bytes_are_not_left_in_the_file(path):
    rows = SqliteRows(path)
    secret = b"seen only in this row"
    put = whole("u", stamp(1))
    rows.put_rows(A, [whole("v", stamp(1)), replace(put, recent=secret * 900)])
    rows.close()
    assert secret in path.read_bytes()
    rows.delete_user("u")
    rows.close()
    assert secret not in path.read_bytes()


def test_positions_force_the_log_to_disk_and_rows_do_not(path):
    rows = SqliteRows(path)
    rows.commit_positions(A, 0, {0: 1})
    assert rows._idle[0].execute("PRAGMA synchronous").fetchone() == (2,)
    rows.put_rows(A, [whole("u", stamp(1))])
    assert rows._idle[0].execute("PRAGMA synchronous").fetchone() == (1,)


def test_a_file_that_vanished_while_open_is_an_error_and_not_an_empty_store(path):
    rows = SqliteRows(path)
    rows.put_rows(A, [whole("u", stamp(1))])
    path.unlink()
    with pytest.raises(StoreError, match="removed or replaced"):
        get(rows, "u")
    SqliteRows(path).positions(A)
    with pytest.raises(StoreError, match="removed or replaced"):
        rows.put_rows(A, [whole("u", stamp(2))])


def test_removing_the_store_leaves_no_file(path):
    rows = SqliteRows(path)
    rows.put_rows(A, [whole("u", stamp(1))])
    rows.remove()
    assert list(path.parent.iterdir()) == []
    assert get(rows, "u") is None


def test_a_full_disk_is_a_machine_error_and_what_was_written_stays(path):
    rows = SqliteRows(path)
    rows.put_rows(A, [whole("u", stamp(1))])
    rows._idle[0].execute("PRAGMA max_page_count = 20")
    with pytest.raises(MachineError, match=rf"no space left to write {path}"):
        rows.put_rows(A, [whole(f"u{n}", stamp(2)) for n in range(100)])
    assert rows.get_rows(A, ["u", "u0"]) == [bytes_of(whole("u", stamp(1))), None]


def test_a_folder_that_is_not_there_is_named_with_the_remedy(tmp_path):
    with pytest.raises(StoreError, match=r"nowhere/online\.db.*check that its folder exists"):
        SqliteRows(tmp_path / "nowhere" / "online.db").positions(A)


def test_a_file_of_another_kind_is_named_with_the_remedy(path):
    path.write_bytes(b"not a database, but long enough to have a header " * 10)
    with pytest.raises(StoreError, match=r"online\.db.*no online store"):
        SqliteRows(path).get_rows(A, ["u"])


def test_a_damaged_file_is_named_with_the_remedy(path):
    rows = SqliteRows(path)
    rows.put_rows(A, [whole(f"u{n}", stamp(1)) for n in range(200)])
    rows.close()
    data = bytearray(path.read_bytes())
    data[4096:] = b"\xff" * (len(data) - 4096)
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"online\.db.*run the backfill again"):
        rows.get_rows(A, ["u7"])


def test_a_file_of_a_later_version_is_refused(path):
    rows = SqliteRows(path)
    rows.positions(A)
    rows._idle[0].execute(f"PRAGMA user_version = {SCHEMA_VERSION + 1}")
    with pytest.raises(StoreError, match=f"has schema {SCHEMA_VERSION + 1}, this program knows {SCHEMA_VERSION}"):
        SqliteRows(path).positions(A)


def test_a_lock_that_is_never_released_ends_in_an_error(path, monkeypatch):
    monkeypatch.setattr(sqlite_store, "BUSY_TIMEOUT_S", 0.2)
    rows = SqliteRows(path)
    rows.positions(A)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match="another process held it"):
        rows.put_rows(A, [whole("u", stamp(1))])
    assert time.monotonic() - started_s < 5
    assert get(rows, "u") is None
    other.close()
    assert rows.put_rows(A, [whole("u", stamp(1))]) == [True]


@pytest.mark.parametrize("ttl_s", [0, -1.0, float("nan")])
def test_a_time_to_live_that_is_no_time_is_refused(path, ttl_s):
    with pytest.raises(InputError, match="ttl_s"):
        SqliteRows(path, ttl_s)


def test_connections_are_reused(path):
    rows = SqliteRows(path)
    for n in range(20):
        rows.put_rows(A, [whole("u", stamp(n))])
        get(rows, "u")
    assert len(rows._idle) == 1
