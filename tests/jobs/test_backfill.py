"""The rows of a backfill are those of a plain fold over each user's events, also after a kill; the stream goes on."""

from __future__ import annotations

import shutil
import signal
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from inspect import signature
from pathlib import Path
from subprocess import Popen

import msgspec
import pyarrow as pa
import pytest
from msgspec.structs import replace

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from jobs.backfill import PUTS_PER_S, backfill
from jobs.backfill_task import fold_users
from jobs.cli import backfill as backfill_command
from jobs.ingest import NewLog, ingest
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import CheckpointError, InputError, StoreError, WireError
from models.event import parse
from models.row import Row, RowBytes, advance, encode_row, new_row
from models.wire import Stamp
from tests.jobs.processes import KILL_WAIT_S, kill, kill_when, start, wait_until
from tests.jobs.tiny import DAYS, USERS, Shop, logged, purchases, source, take, write_rows
from tests.pipelines.small_log import assert_rows_equal, read_rows, recent_of
from tests.small_ranker import scoring_checkpoint

pytestmark = pytest.mark.spark

EVENTS = USERS * DAYS * 2
NAMES = [f"u{n}" for n in range(USERS)]
MANY = 12_000
FOLDED = pa.schema(
    [
        *((name, pa.string()) for name in ("user_id", "item_id", "action")),
        *((name, pa.int64()) for name in ("event_time_ms", "partition", "offset", "event_hash")),
        ("weight", pa.float64()),
    ]
)


@pytest.fixture(scope="module")
def checkpoint(shop: Shop) -> Checkpoint:
    return open_checkpoint(shop.checkpoint)


@pytest.fixture
def store(tmp_path: Path) -> StoreHandle:
    (tmp_path / "state").mkdir()
    return StoreHandle(state=tmp_path / "state")


def plain_rows(checkpoint: Checkpoint, log: Path, cut: dict[int, int]) -> dict[str, Row]:
    """Each user's row from the log's own bytes, all events at once."""
    users: dict[str, list[dict]] = {}
    for event in logged(log):
        if event["offset"] <= cut.get(event["partition"], -1):
            users.setdefault(event["user_id"], []).append(event)
    using, rows = checkpoint.fold(), {}
    for user_id, mine in users.items():
        position = Stamp(epoch=1, partition=mine[0]["partition"], offset=-1)
        recent = recent_of(checkpoint, [parse(e["value"]) for e in mine], [e["offset"] for e in mine])
        rows[user_id], _ = advance(new_row(using.spec, 1, position.partition), recent, position, using)
    return rows


def ends(log: Path) -> dict[int, int]:
    return {event["partition"]: event["offset"] for event in logged(log)}


def stored(store: StoreHandle, checkpoint: Checkpoint) -> dict[str, RowBytes | None]:
    return dict(zip(NAMES, store.open().get_rows(checkpoint.checkpoint_id, NAMES), strict=True))


def test_rows_are_those_of_a_plain_fold_to_the_byte(
    spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle
) -> None:
    done = backfill(spark, checkpoint, shop.log, store)

    assert (done.epoch, done.cut, done.log, done.revision, done.newer) == (1, ends(shop.log), str(shop.log), 0, 0)
    assert (done.users, done.events) == (USERS, EVENTS)
    assert store.open().backfill(checkpoint.checkpoint_id) == done
    wanted = plain_rows(checkpoint, shop.log, done.cut)
    assert {user: encode_row(row) for user, row in wanted.items()} == stored(store, checkpoint)
    # The log is longer than the window, so both parts of the rows are put to the test.
    assert all(row.folded.count > 0 and len(row.recent) > 0 for row in wanted.values())


def revised(row: Row, revision: int) -> Row:
    """The row as a backfill of this revision stamps it."""
    stamps = {name: replace(getattr(row, name), revision=revision) for name in ("stamp", "folded_stamp")}
    return replace(row, **stamps)


def test_backfilled_again_only_the_revision_changes(
    spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle
) -> None:
    first = backfill(spark, checkpoint, shop.log, store)
    assert backfill(spark, checkpoint, shop.log, store) == msgspec.structs.replace(first, revision=1)
    wanted = {u: revised(row, 1) for u, row in plain_rows(checkpoint, shop.log, ends(shop.log)).items()}
    assert_rows_equal(read_rows(store.open(), checkpoint, NAMES), wanted)


def test_a_backfill_again_repairs_a_damaged_row(spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle) -> None:
    backfill(spark, checkpoint, shop.log, store)
    (file,) = store.state.glob("*.db")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE rows SET recent = x'00' WHERE user_id = 'u0'")
    connection.close()
    with pytest.raises(WireError):
        read_rows(store.open(), checkpoint, ["u0"])
    backfill(spark, checkpoint, shop.log, store)
    wanted = revised(plain_rows(checkpoint, shop.log, ends(shop.log))["u0"], 1)
    assert_rows_equal(read_rows(store.open(), checkpoint, ["u0"]), {"u0": wanted})


def test_the_rows_of_another_log_are_not_replaced_without_a_new_epoch(
    spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle, tmp_path: Path
) -> None:
    backfill(spark, checkpoint, shop.log, store)
    for epoch in (1, 2):
        other = tmp_path / f"epoch-{epoch}"
        ingest(spark, source(write_rows(tmp_path / "rows.parquet", purchases(range(2)))), other, NewLog(epoch=epoch))
    with pytest.raises(StoreError, match="ingest the new log with --epoch 2"):
        backfill(spark, checkpoint, tmp_path / "epoch-1", store)
    assert backfill(spark, checkpoint, tmp_path / "epoch-2", store).newer == 0


def test_an_earlier_cut_stops_there_and_a_later_one_goes_on(
    spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle
) -> None:
    early = backfill(spark, checkpoint, shop.log, store, {0: 100, 1: 40})
    assert (early.cut, early.events) == ({0: 100, 1: 40}, 142)
    assert_rows_equal(read_rows(store.open(), checkpoint, NAMES), plain_rows(checkpoint, shop.log, early.cut))

    # A partition that is not named is not folded; rows that are further already stay.
    late = backfill(spark, checkpoint, shop.log, store, {0: 200})
    assert (late.cut, late.events) == ({0: 200, 1: -1}, 201)
    wanted = plain_rows(checkpoint, shop.log, {0: 200, 1: 40})
    wanted = {u: revised(row, 1) if row.stamp.partition == 0 else row for u, row in wanted.items()}
    assert_rows_equal(read_rows(store.open(), checkpoint, NAMES), wanted)


def test_the_stream_starts_at_the_cut(spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle) -> None:
    from pipelines.delta_source import open_log
    from pipelines.positions import start_positions

    backfill(spark, checkpoint, shop.log, store, {0: 100, 1: 40})
    rows, log = store.open(), open_log(shop.log / "events")
    record = rows.backfill(checkpoint.checkpoint_id)
    assert start_positions(log, rows.positions(checkpoint.checkpoint_id), record, "resume") == {0: 100, 1: 40}


def test_users_of_many_batches_have_the_same_rows(
    spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle
) -> None:
    spark.conf.set("spark.sql.execution.arrow.maxRecordsPerBatch", 7)
    try:
        done = backfill(spark, checkpoint, shop.log, store)
    finally:
        spark.conf.unset("spark.sql.execution.arrow.maxRecordsPerBatch")
    assert (done.users, done.events) == (USERS, EVENTS)
    assert_rows_equal(read_rows(store.open(), checkpoint, NAMES), plain_rows(checkpoint, shop.log, done.cut))


def test_no_batch_and_an_empty_batch_give_no_rows(spark, shop: Shop, checkpoint: Checkpoint) -> None:
    empty = pa.RecordBatch.from_pylist([], FOLDED)
    assert list(fold_users([], Opened(checkpoint), 1)) == []
    assert list(fold_users([empty], Opened(checkpoint), 1)) == []


def test_a_row_of_nulls_erases_what_came_before_it_of_its_user(checkpoint: Checkpoint) -> None:
    row = {"item_id": "i1", "action": "view", "event_time_ms": 1_600_000_000_000, "weight": 1.0, "event_hash": 7}
    row |= {"partition": 0}
    erased = dict.fromkeys(row) | {"partition": 0}
    rows = [row | {"user_id": "a", "offset": 0}, erased | {"user_id": "a", "offset": 2}]
    rows += [row | {"user_id": "a", "offset": 5}, row | {"user_id": "b", "offset": 1}]
    rows += [erased | {"user_id": "b", "offset": 3}]
    # Each row in a batch of its own, and all in one.
    for batches in ([[r] for r in rows], [rows]):
        records = [pa.RecordBatch.from_pylist(batch, FOLDED) for batch in batches]
        found = dict(fold_users(records, Opened(checkpoint), 1))
        assert {user: (r.count, r.stamp.offset) for user, r in found.items()} == {"a": (1, 5), "b": (0, 3)}


@pytest.mark.parametrize(
    ("cut", "words"),
    [
        ({0: 10_000}, r"the cut {0: 10000} lies beyond the log, which ends at {0: \d+, 1: \d+}"),
        ({9: 0}, "the cut {9: 0} lies beyond the log"),
        ({0: -2}, "the cut {0: -2} lies beyond the log"),
    ],
)
def test_a_cut_outside_the_log_is_refused(
    spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle, cut: dict, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        backfill(spark, checkpoint, shop.log, store, cut)
    assert store.open().backfill(checkpoint.checkpoint_id) is None


def test_what_is_missing_is_named(spark, shop: Shop, store: StoreHandle, own_shop: Shop, tmp_path: Path) -> None:
    shutil.rmtree(own_shop.checkpoint / "items")
    with pytest.raises(CheckpointError, match="holds no item table; run: vql encode-items"):
        backfill(spark, open_checkpoint(own_shop.checkpoint), shop.log, store)
    with pytest.raises(InputError, match="is not a Delta table"):
        backfill(spark, open_checkpoint(shop.checkpoint), tmp_path / "nowhere", store)


def test_an_empty_log_is_refused(spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle, tmp_path: Path) -> None:
    bad = [row | {"event_time_ms": 1} for row in purchases(range(1), users=1)]
    assert take(spark, bad, tmp_path / "log").appended == 0
    with pytest.raises(InputError, match="the log is empty"):
        backfill(spark, checkpoint, tmp_path / "log", store)


def test_a_store_that_fails_under_the_workers_says_so(
    spark, shop: Shop, checkpoint: Checkpoint, store: StoreHandle
) -> None:
    # Closed first: a connection that closes later writes its log of changes into the file, and so repairs it.
    opened = store.open()
    opened.positions(checkpoint.checkpoint_id)
    opened.close()
    (file,) = store.state.glob("*.db")
    file.write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError, match="it is no online store"):
        backfill(spark, checkpoint, shop.log, store)


def test_the_command_and_the_job_have_the_same_pace() -> None:
    assert signature(backfill_command).parameters["puts_per_s"].default == PUTS_PER_S


@pytest.mark.slow
def test_after_a_kill_the_same_command_completes_the_rows(spark, tmp_path: Path) -> None:
    checkpoint, log, state = scoring_checkpoint(tmp_path / "checkpoint"), tmp_path / "log", tmp_path / "state"
    # Many users, for many puts.
    take(spark, purchases(range(1), users=MANY)[::2], log)
    command = ["backfill", "--checkpoint", checkpoint.path, "--log", log, "--state", state]
    kill_when(start(command, tmp_path), lambda: rows_in(state) > 0)
    store = StoreHandle(state=state)
    assert 0 < rows_in(state) < MANY
    assert store.open().backfill(checkpoint.checkpoint_id) is None

    done = backfill(spark, checkpoint, log, store)

    assert (done.users, done.events, done.newer, rows_in(state)) == (MANY, MANY, 0, MANY)
    wanted = plain_rows(checkpoint, log, done.cut)
    found = store.open().get_rows(checkpoint.checkpoint_id, list(wanted))
    assert found == [encode_row(row) for row in wanted.values()]


@pytest.mark.slow
def test_a_backfill_beside_the_running_stream_loses_and_doubles_nothing(
    spark, shop: Shop, checkpoint: Checkpoint, own_shop: Shop, tmp_path: Path
) -> None:
    log, store, end = own_shop.log, StoreHandle(state=tmp_path / "state"), ends(shop.log)
    store.state.mkdir()
    backfill(spark, checkpoint, log, store, {0: 100, 1: 40})
    folders = {"checkpoint": checkpoint.path, "log": log, "state": store.state}
    stream = start(["stream", *(f"--{name}={path}" for name, path in folders.items())], tmp_path)
    try:
        # It begins at that cut, and keeps rows in memory.
        caught_up(stream, store, checkpoint, log)
        # It is further than this cut in one partition, and not in the other, whose rows are replaced under it.
        again = backfill(spark, checkpoint, log, store, {0: 200, 1: end[1]})
        assert (again.revision, again.newer) == (1, sum(user_partition == 0 for user_partition in partitions(log)))
        append(spark, log, DAYS)
        caught_up(stream, store, checkpoint, log)
        assert revisions(store, checkpoint) == {0: {0}, 1: {1}}
        with ThreadPoolExecutor(1) as beside:
            last = beside.submit(backfill, spark, checkpoint, log, store)
            append(spark, log, DAYS + 1)
            append(spark, log, DAYS + 2)
        caught_up(stream, store, checkpoint, log)
        assert last.result().revision == 2
        stream.send_signal(signal.SIGTERM)
        assert stream.wait(KILL_WAIT_S) == 0
    finally:
        kill(stream)

    found = read_rows(store.open(), checkpoint, NAMES)
    assert sum(row.count for row in found.values()) == USERS * (DAYS + 3) * 2
    assert_rows_equal(
        {user_id: revised(row, 0) for user_id, row in found.items()},
        {user_id: revised(row, 0) for user_id, row in plain_rows(checkpoint, log, ends(log)).items()},
    )


def append(spark, log: Path, day: int) -> None:
    ingest(spark, source(write_rows(log.parent / f"day-{day}.parquet", purchases(range(day, day + 1)))), log)


def caught_up(stream: Popen[bytes], store: StoreHandle, checkpoint: Checkpoint, log: Path) -> None:
    """Wait until the stream has committed all of the log."""
    wanted = {partition: (1, offset) for partition, offset in ends(log).items()}
    wait_until(stream, lambda: store.open().positions(checkpoint.checkpoint_id) == wanted)


def partitions(log: Path) -> list[int]:
    """Each user's partition."""
    return list({event["user_id"]: event["partition"] for event in logged(log)}.values())


def revisions(store: StoreHandle, checkpoint: Checkpoint) -> dict[int, set[int]]:
    """The revisions of the rows of each partition."""
    found: dict[int, set[int]] = {}
    for row in read_rows(store.open(), checkpoint, NAMES).values():
        found.setdefault(row.stamp.partition, set()).add(row.stamp.revision)
    return found


def rows_in(state: Path) -> int:
    """Rows committed in the store of another process; none until that has made its tables."""
    if not (state / "online.db").exists():
        return 0
    connection = sqlite3.connect(f"file:{state / 'online.db'}?mode=ro", uri=True)
    try:
        return connection.execute("SELECT count(*) FROM rows").fetchone()[0]
    except sqlite3.OperationalError:
        return 0
    finally:
        connection.close()
