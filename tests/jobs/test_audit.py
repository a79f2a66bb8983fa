"""An audit finds nothing in rows that are right, and each row that is not; a repair changes these and no other."""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from msgspec.structs import replace

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.redis_settings import RedisSettings
from feature_repo.store import row_puts, whole_put
from jobs.audit import READS, STORE, AuditPlan, LoggedReads, audit
from jobs.audit_report import AuditReport
from jobs.audit_verdicts import AHEAD, EXTRA, MISSING, SCORES, Tolerance
from jobs.audited_log import AuditedLog
from jobs.backfill import backfill
from jobs.read_log import ReadLog
from jobs.repair import repair
from jobs.row_difference import AGREES, DAMAGED, ENTRIES, RECENT, STAMP
from jobs.scoring import Asked, Scorer, load_scorer
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.event import parse
from models.row import Row, RowBytes, advance, decode_row, encode_row
from models.wire import decode_counts, encode_folded
from pipelines.encode import EncodedBatch
from pipelines.row_cache import RowCache
from pipelines.update import update_rows
from tests.jobs.tiny import purchases, take
from tests.pipelines.small_log import recent_of
from tests.redis_server import running_redis
from tests.small import HOUR_MS, START_MS
from tests.small_ranker import COUNTS, scoring_checkpoint

pytestmark = pytest.mark.spark

KEY = b"a key of the tests, of 32 bytes."
USERS, DAYS = 12, 8
NAMES = [f"u{n}" for n in range(USERS)]
CANDIDATES = ["i1", "i7", "i30", "nothing"]
NOW_MS = START_MS + 400 * HOUR_MS
WRONG = "u3"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return scoring_checkpoint(tmp_path_factory.mktemp("checkpoint") / "c", counts=COUNTS)


@pytest.fixture(scope="module")
def log(spark, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """u1 takes a third of everything back."""
    rows = purchases(range(DAYS), users=USERS)
    back = [row | {"event_id": f"back-{row['event_id']}", "weight": -1.0} for row in rows if row["user_id"] == "u1"]
    log = tmp_path_factory.mktemp("audit") / "log"
    take(spark, rows + back[::3], log)
    return log


@pytest.fixture(params=["embedded", "redis"])
def store(request: pytest.FixtureRequest, tmp_path: Path):
    (tmp_path / "state").mkdir()
    if request.param == "embedded":
        yield StoreHandle(state=tmp_path / "state", redis=None)
        return
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis") as redis:
        yield StoreHandle(state=tmp_path / "state", redis=RedisSettings(url=redis.url))


@pytest.fixture
def embedded(tmp_path: Path) -> StoreHandle:
    (tmp_path / "state").mkdir()
    return StoreHandle(state=tmp_path / "state", redis=None)


class Ranker:
    """A ranker that logs all its reads."""

    def __init__(self, checkpoint: Checkpoint, store: StoreHandle, folder: Path) -> None:
        opened = Opened(checkpoint)
        self.log = ReadLog(folder / "reads", 1.0, KEY, flush_s=3600.0)
        reader = Reader(store.open(), opened)
        self.scorer: Scorer = dataclasses.replace(load_scorer(checkpoint, opened.loaded, reader), read_log=self.log)

    def rank(self, users: list[str]) -> None:
        self.scorer.score([Asked(user_id=user, item_ids=CANDIDATES, now_ms=NOW_MS) for user in users])
        assert self.log.flush()


@pytest.fixture
def ranker_of(tmp_path: Path):
    made = []

    def make(checkpoint: Checkpoint, store: StoreHandle) -> Ranker:
        made.append(Ranker(checkpoint, store, tmp_path))
        return made[-1]

    yield make
    for ranker in made:
        ranker.log.close()
        ranker.scorer.reader.close()


def planned(folder: Path | None = None, *, store_users: int = 0, repair: bool = False, grace_ms: int = 0) -> AuditPlan:
    now_ms = int(time.time() * 1000) + 1000
    reads = folder and LoggedReads(path=folder / "reads", key=KEY, since_ms=now_ms - HOUR_MS, until_ms=now_ms)
    tolerance = Tolerance(grace_ms=grace_ms)
    return AuditPlan(reads=reads, store_users=store_users, now_ms=now_ms, tolerance=tolerance, repair=repair)


def stored(store: StoreHandle, checkpoint: Checkpoint) -> dict[str, RowBytes | None]:
    return dict(zip(NAMES, store.open().get_rows(checkpoint.checkpoint_id, NAMES), strict=True))


def row_of(store: StoreHandle, checkpoint: Checkpoint, user_id: str = WRONG) -> Row:
    data = stored(store, checkpoint)[user_id]
    assert data is not None
    return decode_row(data, checkpoint.spec)


def plant(store: StoreHandle, checkpoint: Checkpoint, row: Row, user_id: str = WRONG) -> None:
    """Put a row in place of the one at the same position, its checksums right."""
    raised = replace(row, stamp=replace(row.stamp, revision=row.stamp.revision + 1))
    assert store.open().put_rows(checkpoint.checkpoint_id, [whole_put(user_id, raised)]) == [True]


def with_wrong_mass(row: Row) -> Row:
    folded = row.folded
    mass = folded.mass_NPR.copy()
    mass.flat[0] *= np.float32(1.001)
    wrong = dataclasses.replace(folded, mass_NPR=mass)
    counts = decode_counts(row.folded_data, COUNTS.spec(row.spec.checkpoint_id))
    return replace(row, folded_data=encode_folded(wrong, row.folded_stamp, counts))


def verdicts(report: AuditReport, source: str) -> dict[str, int]:
    return report.sources[source].by_verdict


def test_right_rows_agree_as_they_were_read_and_as_they_are(
    spark, checkpoint: Checkpoint, log: Path, store: StoreHandle, ranker_of, tmp_path: Path
) -> None:
    backfill(spark, checkpoint, log, store)
    before = stored(store, checkpoint)
    ranker = ranker_of(checkpoint, store)
    ranker.rank([*NAMES, "nobody"])
    report = audit(spark, checkpoint, log, store, planned(tmp_path, store_users=USERS, repair=True))
    assert verdicts(report, READS) == {AGREES: USERS + 1}
    assert verdicts(report, STORE) == {AGREES: USERS}
    assert report.mismatch_ratio == 0
    assert (report.repaired.users, report.repaired.rows) == (0, 0)
    for source in report.sources.values():
        assert 0 <= source.error_max < 1e-5
        assert source.examples == []
        assert (source.stale.fresh, source.stale.quantile_s["1.0"]) == (1.0, 0.0)
    assert 0 <= report.sources[READS].score_error_max < 1e-4
    assert report.sources[STORE].score_error_max is None
    assert stored(store, checkpoint) == before


def test_a_wrong_mass_is_found_and_repaired_and_nothing_else_is_changed(
    spark, checkpoint: Checkpoint, log: Path, store: StoreHandle, ranker_of, tmp_path: Path
) -> None:
    record = backfill(spark, checkpoint, log, store)
    right = stored(store, checkpoint)
    plant(store, checkpoint, with_wrong_mass(row_of(store, checkpoint)))
    ranker_of(checkpoint, store).rank(NAMES)

    report = audit(spark, checkpoint, log, store, planned(tmp_path, store_users=USERS))
    for source in (READS, STORE):
        assert verdicts(report, source) == {AGREES: USERS - 1, ENTRIES: 1}
        assert report.sources[source].mismatch_ratio == pytest.approx(1 / USERS)
        assert report.sources[source].error_max == pytest.approx(1e-3, rel=0.05)
        (example,) = report.sources[source].examples
        assert (example.verdict, example.offset) == (ENTRIES, row_of(store, checkpoint).stamp.offset)
    assert report.repaired is None

    report = audit(spark, checkpoint, log, store, planned(tmp_path, repair=True))
    assert msgspec.structs.asdict(report.repaired) == {"users": 1, "rows": 1, "newer": 0, "revision": 2}
    after = stored(store, checkpoint)
    assert {user for user in NAMES if after[user] != right[user]} == {WRONG}
    wanted = decode_row(right[WRONG], checkpoint.spec)
    assert row_of(store, checkpoint).recent_data == wanted.recent_data
    assert row_of(store, checkpoint).stamp == replace(wanted.stamp, revision=2)
    assert audit(spark, checkpoint, log, store, planned(store_users=USERS)).mismatch_ratio == 0
    # What was read is wrong for ever; the row is not, and is left alone.
    report = audit(spark, checkpoint, log, store, planned(tmp_path, repair=True))
    assert (verdicts(report, READS)[ENTRIES], report.repaired.rows) == (1, 0)
    assert stored(store, checkpoint) == after
    # A later backfill is above it.
    assert (record.revision, backfill(spark, checkpoint, log, store).revision) == (0, 3)


def test_a_newer_row_of_the_stream_is_never_replaced_and_the_stream_goes_on_from_a_repaired_one(
    spark, checkpoint: Checkpoint, log: Path, store: StoreHandle
) -> None:
    backfill(spark, checkpoint, log, store)
    rows, using = store.open(), checkpoint.fold()
    wrong = with_wrong_mass(row_of(store, checkpoint))
    plant(store, checkpoint, wrong)
    # What a stream keeps in memory, and its next put.
    kept = row_of(store, checkpoint)
    one_more = recent_of(checkpoint, [events_of(log, WRONG)[0]], [kept.stamp.offset + 1000])
    ahead, _ = advance(kept, one_more, kept.stamp, using)

    # The stream is first: its row is ahead of the log's copy.
    assert rows.put_rows(checkpoint.checkpoint_id, row_puts([WRONG], [ahead], [kept])) == [True]
    report = audit(spark, checkpoint, log, store, planned(store_users=USERS, repair=True))
    assert verdicts(report, STORE) == {AGREES: USERS - 1, AHEAD: 1}
    assert row_of(store, checkpoint).stamp == ahead.stamp
    # Even where it was found wrong before it went on.
    users = spark.createDataFrame([(WRONG,)], "user_id string")
    done = repair(AuditedLog.open(spark, log), users, checkpoint, store, 5)
    assert (done.users, done.rows, done.newer) == (1, 0, 1)
    assert encode_row(row_of(store, checkpoint)) == encode_row(ahead)


def test_a_stream_that_holds_the_wrong_row_goes_on_from_the_repaired_one(
    spark, checkpoint: Checkpoint, log: Path, store: StoreHandle
) -> None:
    backfill(spark, checkpoint, log, store)
    right = row_of(store, checkpoint)
    plant(store, checkpoint, with_wrong_mass(right))
    kept, rows = row_of(store, checkpoint), store.open()
    cache = RowCache(1 << 20)
    cache.keep([WRONG], [kept])
    report = audit(spark, checkpoint, log, store, planned(store_users=USERS, repair=True))
    assert report.repaired.rows == 1

    using = checkpoint.fold()
    one_more = recent_of(checkpoint, [events_of(log, WRONG)[0]], [kept.stamp.offset + 1000])
    batch = EncodedBatch(
        epoch=1,
        partition=kept.stamp.partition,
        user_ids=[WRONG],
        recent=one_more,
        unknown_items=0,
        unknown_actions=0,
    )
    counts = update_rows(rows, using, batch, cache)
    assert (counts.conflicts, counts.events_folded) == (1, 1)
    wanted, _ = advance(right, one_more, right.stamp, using)
    found = row_of(store, checkpoint)
    assert (found.stamp.offset, found.recent_data) == (wanted.stamp.offset, wanted.recent_data)
    assert np.array_equal(found.folded.mass_NPR, wanted.folded.mass_NPR)


def test_damaged_missing_and_extra_rows_are_found_and_the_first_two_repaired(
    spark, checkpoint: Checkpoint, log: Path, embedded: StoreHandle, ranker_of, tmp_path: Path
) -> None:
    backfill(spark, checkpoint, log, embedded)
    right = stored(embedded, checkpoint)
    embedded.open().put_rows(checkpoint.checkpoint_id, [whole_put("stranger", row_of(embedded, checkpoint, "u5"))])
    (file,) = embedded.state.glob("*.db")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE rows SET recent = x'00' WHERE user_id = 'u0'")
        connection.execute("UPDATE rows SET folded = x'00' WHERE user_id = 'u1'")
        connection.execute("DELETE FROM rows WHERE user_id = 'u2'")
    connection.close()
    ranker_of(checkpoint, embedded).rank([*NAMES, "stranger"])
    report = audit(spark, checkpoint, log, embedded, planned(tmp_path, store_users=USERS, repair=True))
    assert verdicts(report, READS) == {AGREES: USERS - 3, DAMAGED: 2, MISSING: 1, EXTRA: 1}
    assert verdicts(report, STORE) == {AGREES: USERS - 3, DAMAGED: 2, MISSING: 1}
    assert (report.sources[READS].missing, report.sources[READS].extra) == (1, 1)
    assert (report.repaired.users, report.repaired.rows) == (3, 3)
    after = stored(embedded, checkpoint)
    assert {user for user in NAMES if after[user] != right[user]} == {"u0", "u1", "u2"}
    assert audit(spark, checkpoint, log, embedded, planned(store_users=USERS)).mismatch_ratio == 0


def test_a_row_that_holds_other_events_is_found(
    spark, checkpoint: Checkpoint, log: Path, embedded: StoreHandle
) -> None:
    backfill(spark, checkpoint, log, embedded)
    row = row_of(embedded, checkpoint)
    recent = row.recent.copy()
    recent["weight"][-1] += 1
    plant(embedded, checkpoint, replace(row, recent_data=recent.tobytes()))
    # Complete up to a position at which there is no event of the user.
    first = min(NAMES, key=lambda user: row_of(embedded, checkpoint, user).stamp.offset)
    other = row_of(embedded, checkpoint, first)
    assert first != WRONG
    plant(embedded, checkpoint, replace(other, stamp=replace(other.stamp, offset=other.stamp.offset + 1)), first)
    report = audit(spark, checkpoint, log, embedded, planned(store_users=USERS))
    assert verdicts(report, STORE) == {AGREES: USERS - 2, RECENT: 1, STAMP: 1}


def test_a_stale_row_agrees_and_its_staleness_is_that_of_the_oldest_event_that_it_lacks(
    spark, checkpoint: Checkpoint, log: Path, embedded: StoreHandle
) -> None:
    ends = dict(backfill(spark, checkpoint, log, embedded).cut)
    embedded.open().delete_checkpoint(checkpoint.checkpoint_id)
    backfill(spark, checkpoint, log, embedded, {p: end // 2 for p, end in ends.items()})
    before_ms = int(time.time() * 1000)
    report = audit(spark, checkpoint, log, embedded, planned(store_users=USERS))
    assert verdicts(report, STORE) == {AGREES: USERS}
    stale, by_event = report.sources[STORE].stale, report.sources[STORE].stale_event
    assert stale.fresh == 0
    written_s = [path.stat().st_mtime for path in (log / "events").glob("partition=*/*.parquet")]
    least_s, most_s = before_ms / 1000 - max(written_s), time.time() - min(written_s)
    assert least_s - 0.01 < stale.quantile_s["0.5"] <= stale.quantile_s["1.0"] < most_s
    # The oldest event that a row lacks is of the fifth of eight days, for the users in the middle.
    days = (before_ms - START_MS) / HOUR_MS / 24
    assert days - DAYS < by_event.quantile_s["0.5"] / 86_400 < days


def test_new_users_have_a_moment_before_they_are_missing(
    spark, checkpoint: Checkpoint, log: Path, embedded: StoreHandle, ranker_of, tmp_path: Path
) -> None:
    embedded.open().commit_positions(checkpoint.checkpoint_id, 1, {0: 0})
    ranker_of(checkpoint, embedded).rank(["u0"])
    report = audit(spark, checkpoint, log, embedded, planned(tmp_path))
    assert verdicts(report, READS) == {MISSING: 1}
    report = audit(spark, checkpoint, log, embedded, planned(tmp_path, grace_ms=HOUR_MS))
    assert verdicts(report, READS) == {AGREES: 1}


def test_scores_that_are_not_those_of_the_row_are_found(
    spark, checkpoint: Checkpoint, log: Path, embedded: StoreHandle, ranker_of, tmp_path: Path
) -> None:
    backfill(spark, checkpoint, log, embedded)
    ranker = ranker_of(checkpoint, embedded)
    ranker.rank(NAMES[:3])
    table = DeltaTable(tmp_path / "reads").to_pyarrow_table()
    reads = [row | {"score": [row["score"][0] + 0.5, *row["score"][1:]]} for row in table.to_pylist()]
    write_deltalake(tmp_path / "reads", pa.Table.from_pylist(reads, table.schema), mode="overwrite")
    report = audit(spark, checkpoint, log, embedded, planned(tmp_path))
    assert verdicts(report, READS) == {SCORES: 3}
    assert report.sources[READS].score_error_max == pytest.approx(0.5, rel=1e-3)


def test_nothing_to_audit_is_an_error(
    spark, checkpoint: Checkpoint, log: Path, embedded: StoreHandle, ranker_of, tmp_path: Path
) -> None:
    backfill(spark, checkpoint, log, embedded)
    with pytest.raises(InputError, match="nothing to audit"):
        audit(spark, checkpoint, log, embedded, planned())
    with pytest.raises(InputError, match="reads is not a Delta table"):
        audit(spark, checkpoint, log, embedded, planned(tmp_path))
    ranker_of(checkpoint, embedded).rank(["u0"])
    plan = planned(tmp_path)
    old = dataclasses.replace(plan.reads, since_ms=0, until_ms=plan.now_ms - HOUR_MS)
    with pytest.raises(InputError, match="holds no read of checkpoint"):
        audit(spark, checkpoint, log, embedded, dataclasses.replace(plan, reads=old))


def events_of(log: Path, user_id: str):
    rows = DeltaTable(log / "events").to_pyarrow_table().sort_by([("partition", "ascending"), ("offset", "ascending")])
    return [parse(row["value"]) for row in rows.to_pylist() if row["user_id"] == user_id]
