"""The heart of the product: one log, three engines, the same rows; and the same scores as raw attention.

The log is ingested in pieces that overlap in time, so a third of the events are late. Spark backfills it. Beam
streams it with every batch delivered twice, and is killed once on the way. A plain fold knows neither.
"""

from __future__ import annotations

import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from deltalake import DeltaTable

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from jobs.backfill import backfill
from jobs.ingest import EventSource, NewLog, ingest
from jobs.parity import compare_rows
from models.checkpoint import Checkpoint
from models.event import Event, parse
from models.load import load_ranker
from models.request import Impression, collate, counted
from models.row import Row, advance, new_row
from models.wire import Stamp
from pipelines.stream import StreamPlan
from tests.pipelines.small_log import assert_rows_equal, read_rows, recent_of
from tests.small import HOUR_MS, START_MS, random_events
from tests.small_ranker import COUNTS, scoring_checkpoint
from tests.twice import run_twice

pytestmark = [pytest.mark.spark, pytest.mark.beam, pytest.mark.slow]

USERS = [f"u{n}" for n in range(40)]
EVENTS = 4000
PARITY_MAX = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return scoring_checkpoint(tmp_path_factory.mktemp("checkpoint") / "vql", counts=COUNTS)


@pytest.fixture(scope="module")
def log(spark, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three ingests, each ordered by time within: offsets and event times disagree between them."""
    folder = tmp_path_factory.mktemp("log")
    events = random_events(EVENTS, users=len(USERS), seed=11)
    share = np.random.default_rng(0).integers(0, 3, EVENTS)
    for part in range(3):
        rows = [msgspec.structs.asdict(e) for e, s in zip(events, share, strict=True) if s == part]
        pq.write_table(pa.Table.from_pylist(rows), folder / f"{part}.parquet")
        ingest(
            spark,
            EventSource(path=folder / f"{part}.parquet", format="parquet", columns={}),
            folder / "log",
            NewLog(partitions=3),
        )
    return folder / "log"


def test_plain_spark_and_beam_give_the_same_rows_and_scores(spark, checkpoint, log, tmp_path):
    history = logged_events(log)
    plain = plain_rows(checkpoint, history)
    by_spark, by_beam = StoreHandle(state=tmp_path / "spark"), StoreHandle(state=tmp_path / "beam")
    for handle in (by_spark, by_beam):
        handle.state.mkdir()

    done = backfill(spark, checkpoint, log, by_spark)
    stream_killed_once(checkpoint, log, by_beam, tmp_path / "letters")

    assert done.events == EVENTS
    for handle in (by_spark, by_beam):
        assert_rows_equal(read_rows(handle.open(), checkpoint, USERS), plain)
        reader = Reader(handle.open(), Opened(checkpoint))
        parity = compare_rows(reader, log)
        assert parity.conserved
        assert parity.users == len(plain)
        assert parity.max_abs_error <= PARITY_MAX
        assert score_error(reader, history) <= PARITY_MAX


def test_the_comparison_of_scores_can_fail(spark, checkpoint, log, tmp_path):
    handle = StoreHandle(state=tmp_path)
    backfill(spark, checkpoint, log, handle, {0: 10, 1: 10, 2: 10})
    reader = Reader(handle.open(), Opened(checkpoint))
    assert score_error(reader, logged_events(log)) > PARITY_MAX
    assert not compare_rows(reader, log).conserved


def logged_events(log: Path) -> dict[str, list[tuple[int, int, Event]]]:
    """Each user's (partition, offset, event) in log order, from the log's own bytes."""
    table = DeltaTable(log / "events").to_pyarrow_table(columns=["partition", "offset", "value"]).sort_by("offset")
    users: dict[str, list[tuple[int, int, Event]]] = {}
    for row in table.to_pylist():
        event = parse(row["value"])
        users.setdefault(event.user_id, []).append((row["partition"], row["offset"], event))
    return users


def plain_rows(checkpoint: Checkpoint, history: dict[str, list[tuple[int, int, Event]]]) -> dict[str, Row]:
    using, rows = checkpoint.fold(), {}
    for user_id, logged in history.items():
        position = Stamp(epoch=1, partition=logged[0][0], offset=-1)
        recent = recent_of(checkpoint, [e for _, _, e in logged], [o for _, o, _ in logged])
        rows[user_id], _ = advance(new_row(using.spec, 1, position.partition), recent, position, using)
    return rows


def stream_killed_once(checkpoint: Checkpoint, log: Path, handle: StoreHandle, letters: Path) -> None:
    """Kill -9 the stream once it has committed something, then let another finish, from where that one was."""
    paths = [log / "events", checkpoint.path, handle.state, letters]
    process = subprocess.Popen([sys.executable, "-m", "tests.twice", *map(str, paths)], cwd=Path(__file__).parents[1])
    rows = handle.open()
    for _ in range(2400):
        if rows.positions(checkpoint.checkpoint_id) or process.poll() is not None:
            break
        time.sleep(0.05)
    process.kill()
    assert process.wait() == -9, "the stream ended before it could be killed"
    committed = sum(offset + 1 for _, offset in rows.positions(checkpoint.checkpoint_id).values())
    assert 0 < committed < EVENTS
    plan = StreamPlan(
        log_path=paths[0], checkpoint_path=checkpoint.path, store=handle, dead_letters_path=letters, start="earliest"
    )
    run_twice(replace(plan, batch_size=501))


@torch.inference_mode()
def score_error(reader: Reader, history: dict[str, list[tuple[int, int, Event]]]) -> float:
    """The largest difference of any score from the row against attention over the raw history."""
    table, now_ms = reader.fold.table, START_MS + (EVENTS // 60 + 100) * HOUR_MS
    ranker = load_ranker(reader.checkpoint, table.feature_MF, table.cell_MQ)
    worst = 0.0
    for user_id, logged in history.items():
        events = [event for _, _, event in logged]
        one = Impression(
            user_id=user_id,
            now_ms=now_ms,
            candidate_C=np.arange(len(table)),
            label_C=np.zeros(len(table)),
            item_L=table.lookup([e.item_id for e in events]),
            action_L=reader.checkpoint.action_index([e.action for e in events]),
            time_ms_L=np.array([e.event_time_ms for e in events]),
            weight_L=np.array([e.weight for e in events], np.float32),
        )
        request = collate([one], counts=counted([one], ranker.counter))
        raw, _ = ranker(request)
        cached = ranker.from_cache(request.candidate_BC, reader.read([user_id]).caches, request.now_ms_B)
        worst = max(worst, float((raw - cached).abs().max()))
    return worst
