"""An audit finds nothing in rows that are right, and each row that is not; a repair changes these and no other."""

from __future__ import annotations

import dataclasses
import sqlite3
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake
from msgspec.structs import replace

from feature_repo.handle import StoreHandle
from feature_repo.redis_settings import RedisSettings
from feature_repo.store import row_puts, whole_put
from jobs.audit import READS, STORE, AuditPlan, audit
from jobs.audit_reads import LoggedReads
from jobs.audit_verdicts import AHEAD, EXTRA, MISSING, SCORES, Tolerance
from jobs.audited_log import AuditedLog
from jobs.forget import Places, forget
from jobs.repair import Repaired, repair
from jobs.row_difference import AGREES, DAMAGED, ENTRIES, LATER_ITEMS, RECENT, STAMP
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.item_table import append_segments
from models.row import Row, advance, encode_row, new_row
from models.user_hash import KEY_FILE, hashed_user
from models.wire import decode_counts, encode_folded
from pipelines.encode import EncodedBatch
from pipelines.row_cache import RowCache
from pipelines.update import update_rows
from tests.jobs.audited import KEY, AuditedShop, audited_shop, key_file
from tests.jobs.forgettable import fold_at, put_events
from tests.jobs.tiny import purchases
from tests.pipelines.small_log import recent_of
from tests.redis_server import running_redis
from tests.small import HOUR_MS, START_MS
from tests.small_ranker import COUNTS, scoring_checkpoint
from tests.twin import assert_same_cache

pytestmark = pytest.mark.spark

USERS, DAYS = 12, 8
NAMES = [f"u{n}" for n in range(USERS)]
WRONG, GONE = "u3", "u2"
# Of an item that was encoded after its event had been folded; and new in the log.
LATER, FRESH, NEW_ITEM = "later", "fresh", "i77"


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> AuditedShop:
    """u1 takes a third of everything back."""
    folder = tmp_path_factory.mktemp("audit")
    checkpoint = scoring_checkpoint(folder / "checkpoint", counts=COUNTS)
    encode_later(checkpoint)
    rows = sorted(purchases(range(DAYS), users=USERS), key=lambda row: row["event_time_ms"])
    mine = [row for row in rows if row["user_id"] == "u1"]
    rows += [row | {"event_id": f"back-{row['event_id']}", "weight": -1.0} for row in mine[::3]]
    for name, item in ((LATER, NEW_ITEM), (FRESH, "i1")):
        rows += [mine[0] | {"event_id": f"{name}{n}", "user_id": name, "item_id": item} for n in range(9)]
    return audited_shop(checkpoint, folder / "log", rows, fresh=[FRESH])


def encode_later(checkpoint: Checkpoint) -> None:
    """Add an item, as `encode-items` does, now."""
    file = checkpoint.items_path / "run-00001" / "part.parquet"
    file.parent.mkdir()
    first = pq.read_table(checkpoint.items_path / "all.parquet").slice(5, 1)
    pq.write_table(first.set_column(0, first.schema.field(0), pa.array([NEW_ITEM])), file)
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [file])


@pytest.fixture
def store(tmp_path: Path) -> StoreHandle:
    (tmp_path / "state").mkdir()
    return StoreHandle(state=tmp_path / "state", redis=None)


@pytest.fixture
def any_store(request: pytest.FixtureRequest, store: StoreHandle, tmp_path: Path):
    if request.param == "embedded":
        yield store
        return
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis") as redis:
        yield dataclasses.replace(store, redis=RedisSettings(url=redis.url))


def planned(path: Path | None = None, *, store_users: int = 0, repair: bool = False) -> AuditPlan:
    now_ms = int(time.time() * 1000) + 1000
    reads = None
    if path is not None:
        key = key_file(path.parent)
        reads = LoggedReads(path=path, key_file=key, since_ms=now_ms - HOUR_MS, until_ms=now_ms)
    tolerance = Tolerance(grace_ms=HOUR_MS)
    return AuditPlan(reads=reads, store_users=store_users, now_ms=now_ms, tolerance=tolerance, repair=repair)


def with_wrong_mass(row: Row) -> Row:
    folded = row.folded
    mass = folded.mass_NPR.copy()
    mass.flat[0] *= np.float32(1.001)
    wrong = dataclasses.replace(folded, mass_NPR=mass)
    counts = decode_counts(row.folded_data, COUNTS.spec(row.spec.checkpoint_id))
    return replace(row, folded_data=encode_folded(wrong, row.folded_stamp, counts))


def test_right_rows_agree_as_they_were_read_and_as_they_are(
    spark, shop: AuditedShop, store: StoreHandle, tmp_path: Path
) -> None:
    shop.fill(store, {name: shop.row(name) for name in shop.events})
    before, users = shop.stored(store), len(shop.events)
    shop.read(store, [*shop.events, "nobody"], tmp_path / "reads")
    plan = planned(tmp_path / "reads", store_users=users, repair=True)
    report = audit(spark, shop.checkpoint, shop.log, store, plan)
    assert report.sources[READS].by_verdict == {AGREES: users + 1}
    assert report.sources[STORE].by_verdict == {AGREES: users}
    assert report.mismatch_ratio == 0
    assert report.repaired == Repaired()
    for source in report.sources.values():
        assert 0 <= source.error_max < 1e-5
        assert (source.users, source.examples) == (users, [])
        assert (source.stale.fresh, source.stale.quantile_s["1.0"]) == (1.0, 0.0)
    assert 0 <= report.sources[READS].score_error_max < 1e-4
    assert report.sources[STORE].score_error_max is None
    assert shop.stored(store) == before


@pytest.mark.parametrize("any_store", ["embedded", "redis"], indirect=True)
def test_a_wrong_mass_is_found_and_repaired_and_nothing_else_is_changed(
    spark, shop: AuditedShop, any_store: StoreHandle, tmp_path: Path
) -> None:
    shop.fill(any_store, {name: shop.row(name) for name in NAMES})
    right = shop.stored(any_store)
    shop.plant(any_store, WRONG, with_wrong_mass(shop.row(WRONG)))
    shop.read(any_store, NAMES, tmp_path / "reads")
    report = audit(spark, shop.checkpoint, shop.log, any_store, planned(tmp_path / "reads", repair=True))
    reads = report.sources[READS]
    assert reads.by_verdict == {AGREES: USERS - 1, ENTRIES: 1}
    assert reads.mismatch_ratio == pytest.approx(1 / USERS)
    assert reads.error_max == pytest.approx(1e-3, rel=0.05)
    assert [(each.verdict, each.offset) for each in reads.examples] == [(ENTRIES, shop.row(WRONG).stamp.offset)]
    assert report.repaired == Repaired(users=1, rows=1, newer=0, revision=2)
    after = shop.stored(any_store)
    assert {user for user in NAMES if after[user] != right[user]} == {WRONG}
    found, wanted = shop.stored_row(any_store, WRONG), shop.row(WRONG)
    assert (found.stamp, found.recent_data) == (replace(wanted.stamp, revision=2), wanted.recent_data)
    assert_same_cache(found.folded, wanted.folded)
    # A later backfill is above it.
    assert any_store.open().backfill(shop.checkpoint.checkpoint_id).revision == 2

    # What was read is wrong for ever; the row is not, and is left alone.
    report = audit(spark, shop.checkpoint, shop.log, any_store, planned(tmp_path / "reads", repair=True))
    assert (report.sources[READS].by_verdict[ENTRIES], report.repaired) == (1, Repaired())
    assert shop.stored(any_store) == after


def test_every_kind_of_fault_is_named_and_what_can_be_is_repaired(
    spark, shop: AuditedShop, store: StoreHandle, tmp_path: Path
) -> None:
    rows = {name: shop.row(name) for name in NAMES[:-1]}
    # u11 has no row, and neither has the user whose first event came just now.
    rows |= {LATER: folded_as(shop, unknown_items(shop, LATER)), "stranger": shop.row("u5")}
    # Complete up to a position at which there is no event of the user's.
    rows["u4"] = replace(rows["u4"], stamp=replace(rows["u4"].stamp, offset=rows["u4"].stamp.offset + 1))
    recent = rows["u6"].recent.copy()
    recent["weight"][-1] += 1
    rows["u6"] = replace(rows["u6"], recent_data=recent.tobytes())
    rows["u3"] = with_wrong_mass(rows["u3"])
    shop.fill(store, rows)
    (file,) = store.state.glob("*.db")
    with sqlite3.connect(file) as connection:
        connection.execute("UPDATE rows SET recent = x'00' WHERE user_id = 'u0'")
        connection.execute("UPDATE rows SET folded = x'00' WHERE user_id = 'u1'")
    connection.close()
    before = shop.stored(store)
    shop.read(store, [*shop.events, "stranger"], tmp_path / "reads")
    # As if a ranker had made something else of a row that is right.
    reads = DeltaTable(tmp_path / "reads").to_pyarrow_table()
    logged = reads.to_pylist()
    (one,) = (row for row in logged if row["user_hash"] == hashed_user("u7", KEY))
    one["score"][0] += 0.5
    write_deltalake(tmp_path / "reads", pa.Table.from_pylist(logged, reads.schema), mode="overwrite")

    plan = planned(tmp_path / "reads", store_users=len(shop.events), repair=True)
    report = audit(spark, shop.checkpoint, shop.log, store, plan)
    of_rows = {DAMAGED: 2, STAMP: 1, RECENT: 1, ENTRIES: 1, MISSING: 1, LATER_ITEMS: 1}
    assert report.sources[STORE].by_verdict == {AGREES: USERS - 6 + 1} | of_rows
    assert report.sources[READS].by_verdict == {AGREES: USERS - 6, SCORES: 1, EXTRA: 1} | of_rows
    assert report.sources[READS].score_error_max > 0.49
    assert (report.sources[READS].missing, report.sources[READS].extra) == (1, 1)

    # u4's is ahead of what the log has of it: only a backfill of a new epoch replaces it.
    assert report.repaired == Repaired(users=6, rows=5, newer=1, revision=1)
    after = shop.stored(store)
    assert {user for user in shop.events if after[user] != before[user]} == {"u0", "u1", "u3", "u6", "u11"}
    for user in ("u0", "u1", "u3", "u6", "u11"):
        found, wanted = shop.stored_row(store, user), shop.row(user)
        assert (found.stamp, found.recent_data) == (replace(wanted.stamp, revision=1), wanted.recent_data)
        assert_same_cache(found.folded, wanted.folded)


def unknown_items(shop: AuditedShop, user_id: str) -> np.ndarray:
    """The user's events as they are encoded before any item is known."""
    mine = shop.events[user_id]
    events = recent_of(shop.checkpoint, [event for event, _, _ in mine], [offset for _, _, offset in mine])
    events["item"] = 0
    return events


def folded_as(shop: AuditedShop, events: np.ndarray) -> Row:
    base = new_row(shop.checkpoint.spec, 1, shop.row(LATER).stamp.partition)
    row, _ = advance(base, events, base.stamp, shop.checkpoint.fold())
    return row


def test_a_newer_row_is_never_replaced_and_a_stream_goes_on_from_a_repaired_one(
    spark, shop: AuditedShop, store: StoreHandle
) -> None:
    shop.fill(store, {name: shop.row(name) for name in NAMES})
    rows, using, checkpoint_id = store.open(), shop.checkpoint.fold(), shop.checkpoint.checkpoint_id
    for user in ("u3", "u5"):
        shop.plant(store, user, with_wrong_mass(shop.row(user)))
    # A stream that has both rows in memory goes on with the first one, beyond the log's copy.
    held = {user: shop.stored_row(store, user) for user in ("u3", "u5")}
    more = {user: one_more(shop, user) for user in held}
    ahead, _ = advance(held["u3"], more["u3"], held["u3"].stamp, using)
    assert rows.put_rows(checkpoint_id, row_puts(["u3"], [ahead], [held["u3"]])) == [True]

    report = audit(spark, shop.checkpoint, shop.log, store, planned(store_users=len(shop.events), repair=True))
    assert report.sources[STORE].by_verdict == {AGREES: USERS - 2 + 1, AHEAD: 1, ENTRIES: 1, MISSING: 1}
    assert (report.repaired.rows, report.repaired.newer) == (2, 0)
    # Even a repair that was decided on before the stream went on leaves it alone.
    users = spark.createDataFrame([("u3",)], "user_id string")
    done = repair(AuditedLog.open(spark, shop.log), users, shop.checkpoint, store, 5)
    assert (done.users, done.rows, done.newer) == (1, 0, 1)
    assert shop.stored(store)["u3"] == encode_row(ahead)

    cache = RowCache(1 << 20)
    cache.keep(["u5"], [held["u5"]])
    partition = held["u5"].stamp.partition
    batch = EncodedBatch(
        epoch=1, partition=partition, user_ids=["u5"], recent=more["u5"], unknown_items=0, unknown_actions=0
    )
    counts = update_rows(rows, using, batch, cache)
    assert (counts.conflicts, counts.events_folded) == (1, 1)
    right = shop.row("u5")
    wanted, _ = advance(right, more["u5"], right.stamp, using)
    found = shop.stored_row(store, "u5")
    assert (found.stamp.offset, found.recent_data) == (wanted.stamp.offset, wanted.recent_data)
    assert_same_cache(found.folded, wanted.folded)


def one_more(shop: AuditedShop, user_id: str) -> np.ndarray:
    """An event of the user's beyond the log's end."""
    event, _, offset = shop.events[user_id][0]
    return recent_of(shop.checkpoint, [event], [offset + 100_000])


def test_a_stale_row_agrees_and_is_as_stale_as_the_oldest_event_that_it_lacks(
    spark, shop: AuditedShop, store: StoreHandle
) -> None:
    # Each lacks the newest two of its events, but u0 has all.
    lacking = {name: shop.events[name][-2][0].event_time_ms for name in NAMES[1:]}
    rows = {name: shop.row(name, upto=shop.events[name][-3][2]) for name in lacking}
    shop.fill(store, rows | {name: shop.row(name) for name in ("u0", LATER, FRESH)})
    before_ms = time.time() * 1000
    report = audit(spark, shop.checkpoint, shop.log, store, planned(store_users=len(shop.events)))
    source = report.sources[STORE]
    assert source.by_verdict == {AGREES: len(shop.events)}
    assert source.stale.fresh == pytest.approx(3 / len(shop.events))
    oldest_ms = min(lacking.values())
    assert source.stale.quantile_s["1.0"] >= (before_ms - oldest_ms) / 1000
    assert source.stale.quantile_s["1.0"] <= (time.time() * 1000 - oldest_ms) / 1000
    # Events of this log came into it at once.
    assert source.stale == source.stale_event
    assert oldest_ms > START_MS


def test_nothing_to_audit_is_an_error(spark, shop: AuditedShop, store: StoreHandle, tmp_path: Path) -> None:
    shop.fill(store, {"u0": shop.row("u0")})
    with pytest.raises(InputError, match="nothing to audit"):
        audit(spark, shop.checkpoint, shop.log, store, planned())
    with pytest.raises(InputError, match="reads is not a Delta table"):
        audit(spark, shop.checkpoint, shop.log, store, planned(tmp_path / "reads"))
    with pytest.raises(InputError, match="events is not a Delta table"):
        audit(spark, shop.checkpoint, tmp_path, store, planned(tmp_path / "reads"))
    shop.read(store, ["u0"], tmp_path / "reads")
    plan = planned(tmp_path / "reads")
    old = dataclasses.replace(plan.reads, since_ms=0, until_ms=plan.now_ms - HOUR_MS)
    with pytest.raises(InputError, match="holds no read of checkpoint"):
        audit(spark, shop.checkpoint, shop.log, store, dataclasses.replace(plan, reads=old))
    # Under another key none of its users would be found, and all would seem to be nobody's.
    other = dataclasses.replace(plan.reads, key_file=key_file(tmp_path, KEY[::-1]))
    with pytest.raises(InputError, match="and of this key"):
        audit(spark, shop.checkpoint, shop.log, store, dataclasses.replace(plan, reads=other))


def test_of_a_forgotten_user_only_the_empty_row_is_right_and_what_comes_back_is_found(
    spark, shop: AuditedShop, store: StoreHandle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(KEY_FILE, str(key_file(tmp_path)))
    rows = sorted(purchases(range(DAYS), users=4), key=lambda row: row["event_time_ms"])
    mine = audited_shop(shop.checkpoint, tmp_path / "log", rows)
    mine.fill(store, {name: mine.row(name) for name in mine.events})
    old, users = mine.row(GONE), [*mine.events]
    mine.read(store, users, tmp_path / "reads")
    where = Places(log=mine.log, state=store.state, rows=store.open(), key_file=key_file(tmp_path))
    # Asked for an hour ago, so that no ranker has a row in memory from before; nor has one logged anything since.
    now_ms = int(time.time() * 1000)
    (request,) = forget(where, GONE, 168 * 3600, now_ms=now_ms - HOUR_MS).requests
    DeltaTable(tmp_path / "reads").delete()

    def by_verdict(**more: bool) -> dict[str, dict[str, int]]:
        plan = planned(tmp_path / "reads", store_users=len(users), **more)
        sources = audit(spark, mine.checkpoint, mine.log, store, plan).sources
        return {name: found.by_verdict for name, found in sources.items()}

    # The empty row holds writers back, and rankers read it.
    mine.read(store, users, tmp_path / "reads")
    assert by_verdict() == {STORE: {AGREES: 4}, READS: {AGREES: 4}}
    # The request ends: the log has neither the id nor a row of it, and no row is right. A copy of the store brings one
    # back, and then one of the log an event.
    assert forget(where, GONE, 0, now_ms=now_ms).remains == []
    mine.read(store, [GONE], tmp_path / "reads")
    assert where.rows.put_rows(mine.checkpoint.checkpoint_id, [whole_put(GONE, old)]) == [True]
    mine.read(store, [GONE], tmp_path / "reads")
    assert by_verdict() == {STORE: {AGREES: 3}, READS: {AGREES: 5, EXTRA: 1}}
    event, partition, offset = mine.events[GONE][0]
    put_events(mine.log, partition, {offset: event})
    assert by_verdict(repair=True) == {STORE: {AGREES: 3, EXTRA: 1}, READS: {AGREES: 5, EXTRA: 1}}
    repaired = mine.stored_row(store, GONE)
    assert (repaired.count, repaired.stamp.offset, old.count > 0) == (0, request.offset, True)

    # Who comes back has a row that begins at the request, whoever makes it.
    back = replace(event, event_id="back", event_time_ms=event.event_time_ms + HOUR_MS)
    put_events(mine.log, partition, {request.offset + 1: back})
    fold_at(where.rows, mine.checkpoint, [back], [request.offset + 1])
    mine.read(store, [GONE], tmp_path / "reads")
    assert by_verdict() == {STORE: {AGREES: 4}, READS: {AGREES: 6, EXTRA: 1}}
