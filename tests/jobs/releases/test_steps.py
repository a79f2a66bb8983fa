"""What each step does beside its entry, and what is left when it is cut off between the two."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import pytest

from feature_repo.handle import StoreHandle
from feature_repo.redis_settings import RedisSettings
from feature_repo.store import RowPut
from jobs.backfill import backfill as fill
from jobs.releases.overview import overview
from jobs.releases.states import NO_LIVE, State, gated, retired
from jobs.releases.steps import Operation, add, backfill, gate, promote, retire, rollback, shadow
from jobs.releases.table import read_releases, record
from models.checkpoint import Checkpoint, open_checkpoint
from models.errors import CheckpointError, InputError, StoreError
from models.row import decode_row
from tests.jobs.processes import kill_when, start
from tests.jobs.releases.way import take_live, take_to_backfilled, take_to_shadow
from tests.jobs.serving.shop import put_rows, user_ids
from tests.jobs.tiny import USERS, Shop
from tests.redis_server import running_redis


@pytest.fixture
def operation(table: Path) -> Operation:
    return Operation(table=table)


def state_of(operation: Operation, checkpoint: Checkpoint) -> State:
    return operation.read().current[checkpoint.checkpoint_id].state


def test_a_checkpoint_becomes_known_by_its_folder_whatever_link_names_it(
    operation: Operation, first: Checkpoint, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(first.path)
    (entry,) = add(operation, tmp_path / "link")
    assert (entry.checkpoint_id, entry.path) == (first.checkpoint_id, str(first.path))
    assert add(operation, first.path) == []
    with pytest.raises(CheckpointError, match="is no checkpoint"):
        add(operation, tmp_path)


def test_a_model_that_reads_no_cache_is_not_released(operation: Operation, first: Checkpoint) -> None:
    manifest = msgspec.json.decode((first.path / "manifest.json").read_bytes()) | {"model": "full"}
    (first.path / "manifest.json").write_bytes(msgspec.json.encode(manifest))
    with pytest.raises(InputError, match="'full', which reads no cache"):
        add(operation, first.path)


def test_a_folder_that_holds_another_checkpoint_by_now_is_refused(
    operation: Operation, first: Checkpoint, second: Checkpoint
) -> None:
    add(operation, first.path)
    shutil.rmtree(first.path)
    shutil.copytree(second.path, first.path)
    with pytest.raises(CheckpointError, match=f"{second.checkpoint_id} and not release {first.checkpoint_id}"):
        gate(operation, first.checkpoint_id, lambda candidate, live: pytest.fail("judged"))


def test_promote_flips_and_rollback_needs_no_store(
    operation: Operation, first: Checkpoint, second: Checkpoint, store: StoreHandle
) -> None:
    rows = store.open()
    take_live(operation.table, first.checkpoint_id, first.path)
    take_to_shadow(operation.table, second.checkpoint_id, second.path)
    entries = promote(operation, second.checkpoint_id, rows, "because")
    assert [(e.checkpoint_id, e.state, e.note) for e in entries] == [
        (first.checkpoint_id, "standby", "because"),
        (second.checkpoint_id, "live", "because"),
    ]
    assert promote(operation, second.checkpoint_id, rows) == []
    dry = Operation(table=operation.table, dry_run=True)
    assert [e.state for e in rollback(dry, second.checkpoint_id)] == ["standby", "live"]
    assert state_of(operation, second) == State.LIVE
    rollback(operation, second.checkpoint_id)
    assert state_of(operation, first) == State.LIVE
    assert rollback(operation, second.checkpoint_id) == []


@pytest.mark.parametrize("step", [shadow, promote])
def test_a_release_without_rows_goes_no_further(
    operation: Operation, first: Checkpoint, store: StoreHandle, step
) -> None:
    rows = store.open()
    rows.delete_checkpoint(first.checkpoint_id)
    take_to_backfilled(operation.table, first.checkpoint_id, first.path)
    with pytest.raises(StoreError, match=f"neither a backfill nor positions of checkpoint {first.checkpoint_id}"):
        step(operation, first.checkpoint_id, rows)
    assert state_of(operation, first) == State.BACKFILLED
    put_rows(first, rows)
    step(operation, first.checkpoint_id, rows)
    assert state_of(operation, first) in (State.SHADOW, State.LIVE)


def test_retire_deletes_its_own_rows_alone_and_not_while_a_ranker_may_read_them(
    operation: Operation, first: Checkpoint, second: Checkpoint, store: StoreHandle
) -> None:
    rows = store.open()
    take_live(operation.table, first.checkpoint_id, first.path)
    with pytest.raises(InputError, match="is live: rankers read it"):
        retire(operation, first.checkpoint_id, rows, idle_s=0)
    take_live(operation.table, second.checkpoint_id, second.path)
    with pytest.raises(InputError, match="a ranker may still read it; wait until it is 300 s"):
        retire(operation, first.checkpoint_id, rows, idle_s=300)
    dry = Operation(table=operation.table, dry_run=True)
    assert retire(dry, first.checkpoint_id, rows, idle_s=0)[1] == len(user_ids())
    assert state_of(operation, first) == State.STANDBY
    assert rows.count_rows(first.checkpoint_id) == len(user_ids())

    entries, deleted = retire(operation, first.checkpoint_id, rows, idle_s=0)
    assert ([e.state for e in entries], deleted) == (["retired"], len(user_ids()))
    assert (rows.count_rows(first.checkpoint_id), rows.progress(first.checkpoint_id).begun) == (0, False)
    assert rows.count_rows(second.checkpoint_id) == len(user_ids())
    assert rows.progress(second.checkpoint_id).begun
    # Again: what a stream that was not ended has written since, and nothing else.
    put_rows(first, rows)
    assert retire(operation, first.checkpoint_id, rows, idle_s=300) == ([], len(user_ids()))
    assert retire(operation, first.checkpoint_id, rows, idle_s=300) == ([], 0)


def test_the_state_is_written_before_anything_is_deleted(
    operation: Operation, first: Checkpoint, store: StoreHandle
) -> None:
    rows = store.open()
    take_to_shadow(operation.table, first.checkpoint_id, first.path)
    found = []
    delete = rows.delete_checkpoint

    def deleting(checkpoint_id: str) -> int:
        found.append(state_of(operation, first))
        return delete(checkpoint_id)

    rows.delete_checkpoint = deleting  # type: ignore[method-assign]
    retire(operation, first.checkpoint_id, rows, idle_s=0)
    assert found == [State.RETIRED]


@pytest.mark.slow
def test_a_retire_that_is_killed_while_it_deletes_deletes_the_rest_when_run_again(
    vql, operation: Operation, first: Checkpoint, second: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    many = 30_000
    (tmp_path / "redis").mkdir()
    (tmp_path / "state").mkdir()
    take_to_shadow(operation.table, first.checkpoint_id, first.path)
    with running_redis(tmp_path / "redis") as redis:
        monkeypatch.setenv("VQL_REDIS_URL", redis.url)
        rows = StoreHandle(state=tmp_path / "state", redis=RedisSettings(url=redis.url)).open()
        put_rows(second, rows)
        put_rows(first, rows)
        copy_rows(rows, first, many)
        assert rows.count_rows(first.checkpoint_id) == many + len(user_ids())
        command = [
            "release",
            "retire",
            first.checkpoint_id,
            "--releases",
            operation.table,
            "--state",
            tmp_path / "state",
        ]
        process = start(command, tmp_path)
        kill_when(process, lambda: rows.count_rows(first.checkpoint_id) < many)
        left = rows.count_rows(first.checkpoint_id)
        assert 0 < left < many
        assert state_of(operation, first) == State.RETIRED
        said = vql(*command)
        assert said.code == 0, said
        assert f"{left:,} rows deleted" in said.out
        assert rows.count_rows(first.checkpoint_id) == 0
        assert rows.count_rows(second.checkpoint_id) == len(user_ids())


def copy_rows(rows, checkpoint: Checkpoint, many: int) -> None:
    """So many users more, each with the row of the first."""
    (row,) = rows.get_rows(checkpoint.checkpoint_id, user_ids()[:1])
    stamp = decode_row(row, checkpoint.spec).stamp
    puts = [RowPut(user_id=f"copy{n}", stamp=stamp, recent=row.recent, folded=row.folded) for n in range(many)]
    assert all(rows.put_rows(checkpoint.checkpoint_id, puts))


@pytest.mark.spark
def test_a_backfill_that_was_cut_off_before_its_entry_is_not_done_twice(
    spark, operation: Operation, shop: Shop, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(shop.checkpoint)
    (tmp_path / "state").mkdir()
    store = StoreHandle(state=tmp_path / "state", redis=None)
    add(operation, shop.checkpoint)
    with pytest.raises(InputError, match="run vql release gate"):
        backfill(operation, checkpoint.checkpoint_id, store, lambda each: pytest.fail("filled"))
    record(operation.table, lambda now: gated(now, checkpoint.checkpoint_id, NO_LIVE))
    dry = Operation(table=operation.table, dry_run=True)
    (entry,) = backfill(dry, checkpoint.checkpoint_id, store, lambda each: pytest.fail("filled"))
    assert entry.state == State.BACKFILLED

    def killed(each: Checkpoint):
        fill(spark, each, shop.log, store)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        backfill(operation, checkpoint.checkpoint_id, store, killed)
    assert state_of(operation, checkpoint) == State.GATED
    (entry,) = backfill(operation, checkpoint.checkpoint_id, store, lambda each: pytest.fail("filled again"))
    assert (entry.state, entry.note.split(",")[0]) == (State.BACKFILLED, f"{USERS} rows with 720 events")
    assert backfill(operation, checkpoint.checkpoint_id, store, lambda each: pytest.fail("filled again")) == []
    assert store.open().progress(checkpoint.checkpoint_id).backfill.revision == 0


@pytest.mark.spark
def test_a_backfill_whose_release_was_retired_meanwhile_says_what_to_delete(
    spark, operation: Operation, shop: Shop, tmp_path: Path
) -> None:
    checkpoint = open_checkpoint(shop.checkpoint)
    (tmp_path / "state").mkdir()
    store = StoreHandle(state=tmp_path / "state", redis=None)
    add(operation, shop.checkpoint)
    record(operation.table, lambda now: gated(now, checkpoint.checkpoint_id, NO_LIVE))

    def meanwhile(each: Checkpoint):
        record(operation.table, lambda now: retired(now, each.checkpoint_id))
        return fill(spark, each, shop.log, store)

    with pytest.raises(
        InputError, match=f"its rows are to be deleted again: vql release retire {checkpoint.checkpoint_id}"
    ):
        backfill(operation, checkpoint.checkpoint_id, store, meanwhile)
    assert retire(operation, checkpoint.checkpoint_id, store.open(), idle_s=300) == ([], USERS)


@pytest.mark.spark
def test_items_are_encoded_for_all_releases_but_the_retired(
    vql, spark, operation: Operation, own_shop: Shop, second: Checkpoint
) -> None:
    for path in (own_shop.checkpoint, second.path):
        add(operation, path)
    record(operation.table, lambda now: retired(now, second.checkpoint_id))
    said = vql("encode-items", "--checkpoint", operation.table, "--log", own_shop.log)
    assert (said.code, said.out) == (0, f"0 items added; the table holds 25: {own_shop.checkpoint}\n")


def test_the_overview_counts_rows_and_what_they_are_behind(
    operation: Operation, first: Checkpoint, second: Checkpoint, store: StoreHandle
) -> None:
    rows = store.open()
    take_live(operation.table, first.checkpoint_id, first.path)
    take_to_shadow(operation.table, second.checkpoint_id, second.path)
    ends = rows.progress(first.checkpoint_id).positions[1][1]
    rows.commit_positions(second.checkpoint_id, 1, {1: ends + 40, 2: 9})
    found = {each.checkpoint_id: each for each in overview(operation.read(), rows)}
    assert (found[first.checkpoint_id].rows, found[first.checkpoint_id].behind) == (len(user_ids()), 40 + 10)
    assert (found[second.checkpoint_id].rows, found[second.checkpoint_id].behind) == (len(user_ids()), 0)
    # Offsets of another epoch do not compare.
    rows.commit_positions(second.checkpoint_id, 2, {1: 0})
    found = {each.checkpoint_id: each for each in overview(operation.read(), rows)}
    assert (found[first.checkpoint_id].behind, found[second.checkpoint_id].behind) == (None, 0)
    retire(operation, second.checkpoint_id, rows, idle_s=0)
    found = {each.checkpoint_id: each for each in overview(operation.read(), rows)}
    assert (found[second.checkpoint_id].rows, found[second.checkpoint_id].behind) == (0, None)
    assert found[first.checkpoint_id].behind == 0
    assert [each.rows for each in overview(read_releases(operation.table), None)] == [None, None]
