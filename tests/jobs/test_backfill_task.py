"""What a task does, without Spark: rows of users of any length in bounded memory, put once, paced, beside others."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from msgspec.structs import replace

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowPut, RowStore, whole_put
from jobs.backfill_task import Pace, RowTask, RowWriter, fold_users, write_rows
from jobs.parity import fold_raw
from models.cache import Cache
from models.checkpoint import Checkpoint
from models.errors import MismatchError, TableBehindError, UnavailableError
from models.row import Fold, Row, new_row, whole_cache
from models.wire import Stamp
from tests.small import ITEMS, START_MS, small_checkpoint, write_items

BATCH = 20_000
NO_LIMIT = Pace(0)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint", window=64)


def history(count: int) -> Iterator[pa.RecordBatch]:
    """One user's events, made as they are asked for."""
    for start in range(0, count, BATCH):
        offset_N = np.arange(start, min(start + BATCH, count))
        rng = np.random.default_rng(start)
        yield pa.record_batch(
            {
                "user_id": pa.array(["heavy"]).take(np.zeros(len(offset_N), np.int64)),
                "item_id": pa.array([f"i{n}" for n in range(ITEMS + 5)]).take(
                    rng.integers(0, ITEMS + 5, len(offset_N))
                ),
                "action": pa.array(["purchase", "view", "shout"]).take(rng.integers(0, 3, len(offset_N))),
                "event_time_ms": START_MS + offset_N * 1000 - rng.integers(0, 10**6, len(offset_N)),
                "weight": np.ones(len(offset_N)),
                "partition": np.full(len(offset_N), 3, np.int32),
                "offset": offset_N * 7,
                "event_hash": rng.integers(0, 2**32, len(offset_N)),
            }
        )


def row_at(checkpoint: Checkpoint, offset: int, revision: int = 0) -> Row:
    row = new_row(checkpoint.spec, 1, 0)
    return replace(row, stamp=replace(row.stamp, offset=offset, revision=revision))


def test_a_user_of_a_million_events_takes_no_more_memory_and_has_the_row_of_the_raw_events(
    checkpoint: Checkpoint,
) -> None:
    opened, peaks, made = Opened(checkpoint), [], {}
    dict(fold_users(history(BATCH), opened, 1))  # compiles
    for count in (100_000, 1_000_000):
        tracemalloc.start()
        made = dict(fold_users(history(count), opened, 1))
        peaks.append(tracemalloc.get_traced_memory()[1] + pa.total_allocated_bytes())
        tracemalloc.stop()
    assert peaks[1] < 1.2 * peaks[0]

    row = made["heavy"]
    assert (row.count, row.stamp) == (1_000_000, Stamp(epoch=1, partition=3, offset=999_999 * 7))
    raw = pa.Table.from_batches(list(history(1_000_000)))
    assert_is_of(whole_cache(row, opened.fold), raw, checkpoint, opened.fold)


def assert_is_of(cache: Cache, raw: pa.Table, checkpoint: Checkpoint, using: Fold) -> None:
    """The cache is the independent fold of these raw events, to the rounding of many folds in float32."""
    mass_HKR, mean_HKRD = fold_raw(raw, checkpoint, using)
    spec, width = checkpoint.spec, checkpoint.spec.heads // checkpoint.spec.groups
    assert cache.count == len(raw)
    for n, code in enumerate(cache.code_N.tolist()):
        group, word = divmod(code, spec.codewords)
        heads = slice(group * width, (group + 1) * width)
        np.testing.assert_allclose(cache.mass_NPR[n], mass_HKR[heads, word], rtol=1e-4, atol=1e-30)
        np.testing.assert_allclose(cache.mean_NPRD[n], mean_HKRD[heads, word], rtol=1e-3, atol=1e-3)
    held_GK = mass_HKR.reshape(spec.groups, width, spec.codewords, -1).any(axis=(1, 3))
    assert len(cache.code_N) == np.count_nonzero(held_GK)


class CountsPuts(SqliteRows):
    """Says which users were put, and how many at once."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.put: list[list[str]] = []

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        self.put.append([put.user_id for put in puts])
        return super().put_rows(checkpoint_id, puts)


def stamps(rows: RowStore, checkpoint: Checkpoint, user_ids: Sequence[str]) -> list[Stamp | None]:
    return rows.get_stamps(checkpoint.checkpoint_id, user_ids)


def test_what_the_store_has_is_not_put_again_and_what_it_has_newer_is_counted(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    rows, before = CountsPuts(tmp_path / "rows.db"), SqliteRows(tmp_path / "rows.db")
    held = {"same": (5, 1), "older": (4, 9), "repaired": (5, 0), "newer": (6, 0), "revised": (5, 2)}
    before.put_rows(checkpoint.checkpoint_id, [whole_put(u, row_at(checkpoint, *at)) for u, at in held.items()])
    writer = RowWriter(rows, checkpoint.checkpoint_id, NO_LIMIT)

    writer.put([(user_id, row_at(checkpoint, 5, 1)) for user_id in [*held, "absent"]])

    assert rows.put == [["older", "repaired", "absent"]]
    assert writer.newer == 2
    wanted = [replace(row_at(checkpoint, 5, 1).stamp, offset=o, revision=r) for o, r in ((6, 0), (5, 2))]
    assert stamps(before, checkpoint, ["newer", "revised"]) == wanted
    assert set(stamps(before, checkpoint, ["same", *rows.put[0]])) == {row_at(checkpoint, 5, 1).stamp}


class Overtaken(CountsPuts):
    """Another writer puts a newer row of "u" between a look and the put."""

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        newer = replace(puts[0], user_id="u", stamp=replace(puts[0].stamp, offset=99))
        SqliteRows(self.path).put_rows(checkpoint_id, [newer])
        return super().put_rows(checkpoint_id, puts)


def test_a_writer_that_was_first_meanwhile_is_counted_and_kept(checkpoint: Checkpoint, tmp_path: Path) -> None:
    rows = Overtaken(tmp_path / "rows.db")
    writer = RowWriter(rows, checkpoint.checkpoint_id, NO_LIMIT)
    writer.put([("u", row_at(checkpoint, 5)), ("v", row_at(checkpoint, 5))])
    assert (writer.newer, rows.put) == (1, [["u", "v"]])
    assert [stamp and stamp.offset for stamp in stamps(rows, checkpoint, ["u", "v"])] == [99, 5]


class LosesAnswers(CountsPuts):
    """Every other call fails; puts were done by then."""

    calls = 0

    def get_stamps(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[Stamp | None]:
        self._falter()
        return super().get_stamps(checkpoint_id, user_ids)

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        accepted = super().put_rows(checkpoint_id, puts)
        self._falter()
        return accepted

    def _falter(self) -> None:
        self.calls += 1
        if self.calls % 2:
            raise UnavailableError("gone")


def test_a_store_that_is_away_for_a_moment_is_waited_for_and_no_row_counts_as_anothers(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away = LosesAnswers(tmp_path / "rows.db")
    task = a_task(checkpoint, tmp_path)
    monkeypatch.setattr(StoreHandle, "open", lambda handle: away)
    assert write_rows(task, history(50)) == (1, 50, 0)
    assert away.calls >= 4
    assert away.put == [["heavy"], ["heavy"]]
    assert stamps(SqliteRows(away.path), checkpoint, ["heavy"]) == [Stamp(epoch=1, partition=3, offset=49 * 7)]


def a_task(checkpoint: Checkpoint, state: Path, **changes: object) -> RowTask:
    settings = {
        "checkpoint": checkpoint.path,
        "checkpoint_id": checkpoint.checkpoint_id,
        "items": ITEMS + 1,
        "store": StoreHandle(state=state),
        "epoch": 1,
        "revision": 0,
        "puts_per_s": 0.0,
    }
    return RowTask(**(settings | changes))


def test_a_worker_that_has_another_checkpoint_or_too_few_items_stops(checkpoint: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(MismatchError, match=f"is checkpoint {checkpoint.checkpoint_id}, not ff"):
        write_rows(a_task(checkpoint, tmp_path, checkpoint_id="ff" * 16), history(50))
    assert write_rows(a_task(checkpoint, tmp_path), history(50)).events == 50
    longer = a_task(checkpoint, tmp_path, items=ITEMS + 2)
    with pytest.raises(TableBehindError, match=f"had {ITEMS + 2} items where the backfill began, and has {ITEMS + 1}"):
        write_rows(longer, history(50))
    # It looks again at once: another machine's file may come later than the task.
    write_items(checkpoint, ["new"], "items-00001.parquet")
    assert write_rows(longer, history(50)).users == 1


def test_puts_are_paced_and_never_catch_up() -> None:
    now_s, slept = [100.0], []

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        now_s[0] += seconds

    pace = Pace(50.0, lambda: now_s[0], sleep)
    went_s = []
    for count in (100, 100, 25, 100):
        pace.wait(count)
        went_s.append(now_s[0] - 100.0)
    assert went_s == [0.0, *accumulate((2.0, 2.0, 0.5))]
    now_s[0] += 1000.0
    for _ in range(3):
        pace.wait(100)
        went_s.append(now_s[0] - 1100.0)
    assert went_s[4:] == pytest.approx([4.5, 6.5, 8.5])
    count_before = len(slept)
    free = Pace(0, lambda: now_s[0], sleep)
    free.wait(10**9)
    free.wait(10**9)
    assert len(slept) == count_before
