"""The heart: however a log is delivered, the rows are those of a plain fold over it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pytest

from feature_repo.handle import StoreHandle
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import Backfill, RowPut
from models.checkpoint import Checkpoint
from models.errors import InputError, StoreError, WireError
from models.event import Event
from models.item_table import UNKNOWN
from models.row import whole_cache
from models.wire import Stamp
from pipelines.dead_letters import read_dead_letters
from pipelines.delta_source import open_log
from pipelines.stream import StreamPlan, StreamReport, run
from pipelines.worker import Opened, stop_requested
from tests.pipelines.faulty import FailingHandle
from tests.pipelines.small_log import (
    append,
    append_all,
    assert_rows_equal,
    by_partition,
    new_log,
    partition_of,
    plain_rows,
    read_rows,
    recent_of,
)
from tests.small import ITEMS, START_MS, random_events, small_checkpoint, write_items
from tests.twin import assert_formula

pytestmark = pytest.mark.beam

USERS = [f"u{n}" for n in range(30)]
REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def plan(checkpoint: Checkpoint, tmp_path: Path) -> StreamPlan:
    (tmp_path / "state").mkdir()
    return StreamPlan(
        log_path=new_log(tmp_path / "log"),
        checkpoint_path=checkpoint.path,
        store=StoreHandle(state=tmp_path / "state"),
        dead_letters_path=tmp_path / "dead_letters",
        start="earliest",
        batch_size=100,
        poll_s=0.05,
    )


def events_in_log(plan: StreamPlan, count: int = 1500, users: int = 30) -> list[Event]:
    events = random_events(count, users=users)
    append_all(plan.log_path, by_partition(events))
    return events


def assert_complete(plan: StreamPlan, checkpoint: Checkpoint, events: Sequence[Event]) -> None:
    found = read_rows(plan.store.open(), checkpoint, USERS)
    assert_rows_equal(found, plain_rows(checkpoint, events))
    counts = {p: sum(partition_of(e) == p for e in events) for p in (0, 1)}
    assert plan.store.open().positions(checkpoint.checkpoint_id) == {p: (1, n - 1) for p, n in counts.items()}


def test_the_stream_writes_the_rows_of_a_plain_fold(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events = events_in_log(plan)

    report = run(plan)

    assert_complete(plan, checkpoint, events)
    assert (report.records_read, report.events_folded, report.events_skipped) == (1500, 1500, 0)
    assert report.unknown_items == sum(event.item_id.startswith("new") for event in events)
    assert report.unknown_actions == sum(event.action == "shout" for event in events)


def test_the_caches_are_the_formula_over_the_raw_events(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events, using = events_in_log(plan, 400), checkpoint.fold()
    run(plan)

    for user_id, row in read_rows(plan.store.open(), checkpoint, USERS).items():
        mine = [event for event in events if event.user_id == user_id]
        assert_formula(whole_cache(row, using), using.encode(recent_of(checkpoint, mine, range(len(mine)))))


def test_a_log_delivered_again_changes_nothing(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events_in_log(plan)
    run(plan)
    before = plan.store.open().get_rows(checkpoint.checkpoint_id, USERS)

    report = run(plan)

    assert (report.events_folded, report.events_skipped, report.rows_written) == (0, 1500, 0)
    assert plan.store.open().get_rows(checkpoint.checkpoint_id, USERS) == before


def test_a_redelivery_with_news_adds_the_news_alone(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events = _run_half_then_all(plan)

    assert_complete(plan, checkpoint, events)


def test_without_the_skip_rule_the_redelivery_shows(
    plan: StreamPlan, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The negative control of the test above: it can fail."""
    monkeypatch.setattr(Stamp, "covers", lambda *_: False)

    _run_half_then_all(plan)

    assert sum(row.count for row in read_rows(plan.store.open(), checkpoint, USERS).values()) == 600 + 1200


@pytest.mark.parametrize(("batch_size", "bundle_s"), [(7, 0.02), (64, 2.0), (1000, 0.02)])
def test_the_size_of_batches_and_bundles_does_not_matter(
    plan: StreamPlan, checkpoint: Checkpoint, batch_size: int, bundle_s: float
) -> None:
    events = events_in_log(plan, 600)

    run(replace(plan, batch_size=batch_size, bundle_s=bundle_s))

    assert_complete(plan, checkpoint, events)


@pytest.mark.parametrize("calls", [0, 3, 11])
def test_a_failing_put_fails_the_stream_and_commits_nothing_unput(
    plan: StreamPlan, checkpoint: Checkpoint, calls: int
) -> None:
    events = events_in_log(plan)

    with pytest.raises(StoreError, match="the planted failure"):
        run(replace(plan, store=FailingHandle(real=plan.store, calls=calls), bundle_s=0.02))

    rows = plan.store.open()
    put = dict.fromkeys((0, 1), -1)
    for row in read_rows(rows, checkpoint, USERS).values():
        put[row.stamp.partition] = max(put[row.stamp.partition], row.stamp.offset)
    positions = rows.positions(checkpoint.checkpoint_id)
    assert all(offset <= put[partition] for partition, (_, offset) in positions.items())
    assert sum(offset + 1 for _, offset in positions.values()) < 1500
    run(plan)
    assert_complete(plan, checkpoint, events)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_killed_stream_goes_on_where_its_rows_are(plan: StreamPlan, checkpoint: Checkpoint, seed: int) -> None:
    events = events_in_log(plan)
    rng = np.random.default_rng(seed)
    for least in (1, 100):
        process = _start(replace(plan, batch_size=10, bundle_s=0.05))
        _wait(lambda least=least: _committed(plan, checkpoint) >= least, process)
        time.sleep(rng.uniform(0, 0.15))
        process.kill()
        process.wait()

    report = run(replace(plan, start="resume"))

    assert report.records_read < 1500
    assert_complete(plan, checkpoint, events)


def test_bad_records_are_kept_once_and_everything_else_is_folded(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events = random_events(300, users=30)
    values = by_partition(events)
    for partition, bad in ((0, b"{"), (1, b'{"event_id": 1}')):
        values[partition] += [bad] * 3
    append_all(plan.log_path, values)

    first, again = run(plan), run(replace(plan, batch_size=33))

    assert (first.dead_letters, again.dead_letters) == (6, 0)
    assert (first.records_read, first.events_folded) == (306, 300)
    assert_rows_equal(read_rows(plan.store.open(), checkpoint, USERS), plain_rows(checkpoint, events))
    letters = read_dead_letters(plan.dead_letters_path)
    assert [(x.position, x.reason, x.value) for x in letters] == [
        ((1, partition, offset), reason, values[partition][offset])
        for partition, reason in ((0, "json"), (1, "schema"))
        for offset in range(len(values[partition]) - 3, len(values[partition]))
    ]


def test_letters_that_cannot_be_kept_stop_the_stream_before_anything_is_committed(
    plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    append(plan.log_path, 0, [b"{"], 0)
    plan.dead_letters_path.write_text("a file in the way")

    with pytest.raises(StoreError, match="dead letters cannot be written"):
        run(plan)

    assert {offset for _, offset in plan.store.open().positions(checkpoint.checkpoint_id).values()} <= {-1}


def test_an_empty_log_ends_at_once(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    report = run(plan)

    assert replace(report, seconds=0.0) == StreamReport(seconds=0.0)
    assert read_rows(plan.store.open(), checkpoint, USERS) == {}


def test_a_missing_log_is_said_before_anything_runs(plan: StreamPlan) -> None:
    with pytest.raises(InputError, match="there is no event log at"):
        run(replace(plan, log_path=plan.log_path / "nowhere"))


def test_a_gap_in_the_log_stops_the_stream(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    values = by_partition(random_events(60))[0]
    append(plan.log_path, 0, values, 0)
    append(plan.log_path, 0, values, len(values) + 1)

    with pytest.raises(InputError, match=rf"partition 0: offsets from {len(values)} on are missing"):
        run(plan)


def test_a_damaged_row_stops_the_stream(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events_in_log(plan, 300)
    rows = SqliteRows(Path(plan.store.state) / "online.db")
    stamp = Stamp(epoch=1, partition=0, offset=-1)
    rows.put_rows(
        checkpoint.checkpoint_id,
        [RowPut(user_id="u0", stamp=stamp, folded=b"not a row at all", recent=b"nor this")],
    )

    with pytest.raises(WireError, match="the stored row of user 'u0' cannot be used"):
        run(plan)


def test_a_stream_without_a_backfill_is_refused(plan: StreamPlan) -> None:
    events_in_log(plan, 10)

    with pytest.raises(StoreError, match="never backfilled"):
        run(replace(plan, start="resume"))


def test_a_stream_starts_at_the_cut_of_the_backfill(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events_in_log(plan, 100)
    backfill = Backfill(epoch=1, cut={0: 5, 1: 6}, users=0, events=0, log="log", log_id=open_log(plan.log_path).log_id)
    plan.store.open().record_backfill(checkpoint.checkpoint_id, backfill)

    assert run(replace(plan, start="resume")).records_read == 100 - 6 - 7


def test_streams_with_their_shares_of_the_partitions_make_the_whole(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    events = events_in_log(plan)

    reports = [run(replace(plan, partitions=(partition,))) for partition in (1, 0)]

    assert sum(report.events_folded for report in reports) == 1500
    assert_complete(plan, checkpoint, events)


def test_an_endless_stream_picks_up_new_commits_until_it_is_told_to_stop(
    plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    events = random_events(400, users=30)
    values = by_partition(events)
    ends = [0, 0]

    def feed() -> None:
        for share in range(1, 5):
            for partition in (0, 1):
                stop = share * len(values[partition]) // 4
                append(plan.log_path, partition, values[partition][ends[partition] : stop], ends[partition])
                ends[partition] = stop
            _wait(lambda: _committed(plan, checkpoint) == sum(ends))
        stop_requested.set()

    feeder = threading.Thread(target=feed)
    feeder.start()
    report = run(replace(plan, until="forever"))
    feeder.join()

    assert report.events_folded == 400
    assert_complete(plan, checkpoint, events)


def test_items_encoded_while_a_stream_runs_are_known_to_it(
    plan: StreamPlan, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[Opened.__module__], "LOOK_EVERY_S", 0.05)
    first, second = (
        Event(event_id=name, user_id="u0", item_id="new", action="view", event_time_ms=START_MS + n)
        for n, name in enumerate("ab")
    )

    def feed() -> None:
        append(plan.log_path, 0, [msgspec.json.encode(first)], 0)
        _wait(lambda: _committed(plan, checkpoint) == 1)
        write_items(checkpoint, ["new"], "items-00001.parquet")
        time.sleep(0.5)
        append(plan.log_path, 0, [msgspec.json.encode(second)], 1)
        _wait(lambda: _committed(plan, checkpoint) == 2)
        stop_requested.set()

    feeder = threading.Thread(target=feed)
    feeder.start()
    report = run(replace(plan, until="forever"))
    feeder.join()

    (row,) = read_rows(plan.store.open(), checkpoint, ["u0"]).values()
    assert row.recent["item"].tolist() == [UNKNOWN, ITEMS + 1]
    assert report.unknown_items == 1


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_an_endless_stream_cleanly(plan: StreamPlan, checkpoint: Checkpoint, number: int) -> None:
    events = events_in_log(plan, 300)
    process = _start(replace(plan, until="forever"))
    _wait(lambda: _committed(plan, checkpoint) == 300, process)

    process.send_signal(number)

    assert process.wait(30) == 0
    assert_complete(plan, checkpoint, events)


def _run_half_then_all(plan: StreamPlan) -> list[Event]:
    """The log's first half, then the whole of it in one batch a partition, which brings every user something new."""
    events = random_events(1200, users=4)
    halves = [by_partition(events[:600]), by_partition(events[600:])]
    for partition in (0, 1):
        append(plan.log_path, partition, halves[0][partition], 0)
    run(plan)
    for partition in (0, 1):
        append(plan.log_path, partition, halves[1][partition], len(halves[0][partition]))
    run(replace(plan, batch_size=10_000))
    return events


def _committed(plan: StreamPlan, checkpoint: Checkpoint) -> int:
    """How many records are committed."""
    return sum(offset + 1 for _, offset in plan.store.open().positions(checkpoint.checkpoint_id).values())


def _wait(done: Callable[[], bool], process: subprocess.Popen | None = None) -> None:
    for _ in range(1200):
        if done():
            return
        assert process is None or process.poll() is None, "the stream ended by itself"
        time.sleep(0.05)
    raise AssertionError("waited a minute in vain")


def _start(plan: StreamPlan) -> subprocess.Popen:
    """A stream in a process of its own."""
    program = (
        "import sys; from pathlib import Path; from feature_repo.handle import StoreHandle\n"
        "from pipelines.stream import StreamPlan, run\n"
        f"store = StoreHandle(state=Path({str(plan.store.state)!r}))\n"
        f"run(StreamPlan(log_path=Path({str(plan.log_path)!r}), checkpoint_path=Path({str(plan.checkpoint_path)!r}), "
        f"store=store, dead_letters_path=Path({str(plan.dead_letters_path)!r}), start={plan.start!r}, "
        f"until={plan.until!r}, batch_size={plan.batch_size}, bundle_s={plan.bundle_s}, poll_s={plan.poll_s}))"
    )
    return subprocess.Popen([sys.executable, "-c", program], cwd=REPOSITORY, env={**os.environ, "PYTHONPATH": ""})
