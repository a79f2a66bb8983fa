"""Sampled reads: which, how they get into the table, and what becomes of them when they cannot."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from deltalake import DeltaTable

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.read_log import BUCKET_MS, DROPPED, WRITTEN, ReadLog, SampledRead, forget_before
from jobs.scoring import Asked, Scorer, load_scorer
from models.checkpoint import Checkpoint
from models.row import RowBytes
from models.user_hash import hashed_user
from models.wire import RECENT_MAGIC, read_header
from tests.jobs.serving.shop import CANDIDATES, NOW_MS, put_rows, user_ids
from tests.small_ranker import scoring_checkpoint

KEY = b"a key of the tests, of 32 bytes."
NOON_S = 1_800_000_000.0
USERS = [f"u{n}" for n in range(1000)]


class Clock:
    """Seconds, as they are told."""

    def __init__(self) -> None:
        self.now_s = NOON_S

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def open_log(tmp_path: Path, clock: Clock) -> Iterator:
    """Logs that append only when told to."""
    logs = []

    def opened(share: float = 1.0, key: bytes = KEY, **limits) -> ReadLog:
        logs.append(ReadLog(tmp_path / "reads", share, key, **{"flush_s": 3600.0, "clock": clock} | limits))
        return logs[-1]

    yield opened
    for log in logs:
        log.close()


def a_read(row: RowBytes | None = None) -> SampledRead:
    return SampledRead(
        checkpoint_id="c", history="absent", row=row, asked_ms=5, item_C=np.array([3, 1]), scores=[0.5, -1.0]
    )


def table(log: ReadLog) -> list[dict]:
    return DeltaTable(log.path).to_pyarrow_table().to_pylist()


def test_the_share_of_users_and_minutes_is_as_asked_for_and_everyone_has_a_turn(open_log, clock: Clock) -> None:
    log, minutes, share, taken = open_log(0.02), 500, 0.02, Counter()
    for minute in range(minutes):
        clock.now_s = NOON_S + minute * BUCKET_MS / 1000
        chosen = log.chosen(USERS)
        taken.update(chosen)
        clock.now_s += 59
        assert log.chosen(USERS) == chosen
    wanted = share * minutes * len(USERS)
    assert abs(taken.total() - wanted) < 5 * wanted**0.5
    # 0.98 ** 500 is 4e-5: in the mean 0.04 of the thousand are left out.
    assert len(taken) > len(USERS) - 3
    assert max(taken.values()) < 35


def test_processes_sample_the_same_and_another_key_others(open_log) -> None:
    mine, theirs, others = (open_log(0.1, key).chosen(USERS) for key in (KEY, KEY, KEY[::-1]))
    assert mine == theirs
    assert len(set(mine) & set(others)) < 40 < len(mine)


def test_a_read_is_appended_with_its_rows_bytes_and_without_the_users_id(open_log, tmp_path: Path) -> None:
    checkpoint, log = scoring_checkpoint(tmp_path / "checkpoint"), open_log()
    scorer = scorer_of(checkpoint, tmp_path, log)
    asked = [Asked(user_id=user_id, item_ids=CANDIDATES, now_ms=NOW_MS) for user_id in [*user_ids(), "nobody"]]
    scores = scorer.score(asked)
    assert log.flush()

    found = {row["user_hash"]: row for row in table(log)}
    assert len(found) == len(asked)
    for one, scored in zip(asked, scores.users, strict=True):
        row = found[hashed_user(one.user_id, KEY)]
        (stored,) = scorer.reader.rows.get_rows(checkpoint.checkpoint_id, [one.user_id])
        assert (row["checkpoint_id"], row["history"], row["day"]) == (
            checkpoint.checkpoint_id,
            scored.history,
            "2027-01-15",
        )
        assert (row["read_ms"], row["asked_ms"]) == (int(NOON_S * 1000), NOW_MS)
        assert row["score"] == scored.scores
        assert row["item"] == scorer.table.lookup(CANDIDATES).tolist()
        if stored is None:
            assert (one.user_id, row["folded"], row["recent"], row["epoch"]) == ("nobody", None, None, None)
            continue
        assert (row["folded"], row["recent"]) == (stored.folded, stored.recent)
        stamp = read_header(stored.recent, RECENT_MAGIC).stamp
        assert tuple(row[name] for name in ("epoch", "partition", "offset", "revision")) == (
            stamp.epoch,
            stamp.partition,
            stamp.offset,
            stamp.revision,
        )
    # Parquet is compressed, so the table's own cells are looked at.
    assert not any(user_id.encode() in repr(row).encode() for user_id in ("'u1'", "nobody") for row in table(log))


def test_without_a_log_nothing_is_logged_and_scores_are_the_same(open_log, tmp_path: Path) -> None:
    checkpoint, log = scoring_checkpoint(tmp_path / "checkpoint"), open_log()
    asked = [Asked(user_id=user_id, item_ids=CANDIDATES, now_ms=NOW_MS) for user_id in user_ids()]
    with_log = scorer_of(checkpoint, tmp_path, log).score(asked)
    without = scorer_of(checkpoint, tmp_path, None).score(asked)
    assert [user.scores for user in with_log.users] == [user.scores for user in without.users]
    assert log.flush()
    assert len(table(log)) == len(asked)


def test_a_row_that_is_no_row_is_logged_as_it_is(open_log) -> None:
    log = open_log()
    log.put("u1", a_read(RowBytes(folded=b"?", recent=b"no row")))
    assert log.flush()
    (row,) = table(log)
    assert (row["folded"], row["recent"], row["offset"]) == (b"?", b"no row", None)


def test_what_does_not_fit_is_dropped_and_counted(open_log) -> None:
    size = a_read().size_bytes
    log = open_log(waiting_bytes_max=10 * size)
    # Nothing is appended while half of it waits, since the thread is kept from it.
    with log._flushing:
        for _ in range(25):
            log.put("u1", a_read())
        assert log.metrics.reads == {WRITTEN: 0, DROPPED: 15}
    assert log.flush()
    assert log.metrics.reads == {WRITTEN: 10, DROPPED: 15}
    assert len(table(log)) == 10
    log.put("u1", a_read())
    assert log.flush()
    assert log.metrics.reads == {WRITTEN: 11, DROPPED: 15}


def test_a_table_that_cannot_be_written_is_tried_again_and_loses_nothing(open_log) -> None:
    log = open_log()
    log.path.write_text("no folder")
    log.put("u1", a_read())
    assert not log.flush()
    assert not log.flush()
    log.put("u2", a_read())
    log.path.unlink()
    assert log.flush()
    assert {row["user_hash"] for row in table(log)} == {hashed_user("u1", KEY), hashed_user("u2", KEY)}
    assert (log.metrics.failed_writes, log.metrics.reads[WRITTEN]) == (2, 2)


def test_the_thread_appends_by_itself_and_the_end_appends_the_rest(open_log) -> None:
    log, written = open_log(flush_s=0.05), threading.Event()
    log.put("u1", a_read())
    for _ in range(600):
        if log.metrics.reads[WRITTEN]:
            break
        written.wait(0.05)
    assert len(table(log)) == 1
    late = open_log()
    late.put("u2", a_read())
    late.close()
    late.put("u3", a_read())
    assert len(table(log)) == 2
    assert late.metrics.reads == {WRITTEN: 1, DROPPED: 1}


def test_old_days_are_forgotten(open_log, clock: Clock) -> None:
    log = open_log()
    for _ in range(4):
        log.put("u1", a_read())
        assert log.flush()
        clock.now_s += 86_400
    forget_before(log.path, "2027-01-17")
    assert sorted(row["day"] for row in table(log)) == ["2027-01-17", "2027-01-18"]
    assert len(DeltaTable(log.path).file_uris()) == 2


def test_logs_of_several_threads_and_processes_share_a_table(open_log) -> None:
    logs = [open_log() for _ in range(4)]

    def fill(log: ReadLog) -> None:
        for n in range(5):
            log.put(f"u{n}", a_read())
            while not log.flush():
                pass

    threads = [threading.Thread(target=fill, args=(log,)) for log in logs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(row["user_hash"] for row in table(logs[0])) == {hashed_user(f"u{n}", KEY): 4 for n in range(5)}


def scorer_of(checkpoint: Checkpoint, folder: Path, log: ReadLog | None) -> Scorer:
    (folder / "state").mkdir(exist_ok=True)
    rows = StoreHandle(state=folder / "state", redis=None).open()
    if rows.count_rows(checkpoint.checkpoint_id) == 0:
        put_rows(checkpoint, rows)
    opened = Opened(checkpoint)
    return replace(load_scorer(checkpoint, opened.loaded, Reader(rows, opened)), read_log=log)
