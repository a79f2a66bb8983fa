"""A forgotten user is found nowhere by a search of bytes, everybody else is as before, and nothing brings one back."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from deltalake import DeltaTable

from feature_repo.forgotten import FORGOTTEN, ForgottenRef, read_forgotten
from feature_repo.handle import StoreHandle
from feature_repo.redis_settings import RedisSettings
from feature_repo.store import RowStore
from jobs.forget import Places, forget, plan, verify
from jobs.parity import raw_users
from models.errors import InputError
from models.event import Event
from models.forgotten import ERASED
from models.row import RowBytes, decode_row
from models.user_hash import KEY_FILE, hashed_user
from pipelines.dead_letters import read_dead_letters
from pipelines.stream import StreamPlan, run
from tests.jobs.commands import assert_one_line
from tests.jobs.forgettable import (
    NEARLY,
    WHO,
    Scene,
    add_letters,
    add_reads,
    append_events,
    fill,
    fold_at,
    make_log,
    put_events,
    redis_traces,
    some_events,
    traces,
)
from tests.pipelines.small_log import partition_of
from tests.redis_server import running_redis
from tests.small import START_MS, small_checkpoint

ROOT = Path(__file__).parents[2]
KEY = bytes(range(48))
MINE = hashed_user(WHO, KEY)
WEEK_S = 168 * 3600.0


@pytest.fixture
def key_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "forget.key"
    path.write_bytes(KEY)
    monkeypatch.setenv(KEY_FILE, str(path))
    return path


@pytest.fixture
def scene(tmp_path: Path, key_file: Path) -> Scene:
    events = some_events()
    checkpoints = [small_checkpoint(tmp_path / f"checkpoint{n}", seed=n) for n in range(2)]
    log, state = make_log(tmp_path / "log", events), tmp_path / "state"
    add_letters(log)
    state.mkdir()
    rows = StoreHandle(state=state, redis=None).open()
    for checkpoint in checkpoints:
        fill(rows, checkpoint, events, log)
        add_reads(tmp_path / "reads", rows, checkpoint, sorted({event.user_id for event in events}), KEY)
    rows.close()
    assert traces(log)
    assert traces(state)
    return Scene(log=log, state=state, read_log=tmp_path / "reads", events=events, checkpoints=checkpoints)


def places(scene: Scene, key_file: Path, rows: RowStore | None = None) -> Places:
    opened = StoreHandle(state=scene.state, redis=None).open() if rows is None else rows
    return Places(log=scene.log, state=scene.state, rows=opened, key_file=key_file, read_log=scene.read_log)


def others_events(scene: Scene) -> list[dict]:
    rows = DeltaTable(scene.log / "events").to_pyarrow_table().to_pylist()
    kept = [row for row in rows if row["user_id"] not in (WHO, None)]
    return sorted(kept, key=lambda row: (row["partition"], row["offset"]))


def others_rows(scene: Scene, rows: RowStore) -> dict[tuple[str, str], RowBytes | None]:
    users = [user_id for user_id in scene.users if user_id != WHO]
    return {
        (each.checkpoint_id, user_id): row
        for each in scene.checkpoints
        for user_id, row in zip(users, rows.get_rows(each.checkpoint_id, users), strict=True)
    }


def others_reads(scene: Scene) -> list[dict]:
    rows = DeltaTable(scene.read_log).to_pyarrow_table().to_pylist()
    return sorted((row for row in rows if row["user_hash"] != MINE), key=str)


def traces_of_reads(scene: Scene) -> list[str]:
    """By the hash, and as a deletion spells it; and of the id, which was never there."""
    return [file for each in (MINE, MINE.hex(), WHO) for file in traces(scene.read_log, each)]


def position(scene: Scene, key_file: Path) -> tuple[int, int]:
    """Partition and offset of the newest request."""
    ref = ForgottenRef(path=scene.log / FORGOTTEN, key_file=key_file)
    request = read_forgotten(ref).of(WHO)[-1]
    return request.partition, request.offset


def later(offset: int) -> Event:
    """An event of the user after the request."""
    return Event(
        event_id=f"again-{offset}", user_id=WHO, item_id="i1", action="view", event_time_ms=START_MS + offset * 1000
    )


def test_a_forgotten_user_is_found_nowhere_and_all_others_are_as_before(scene: Scene, key_file: Path) -> None:
    where = places(scene, key_file)
    events, rows, reads = others_events(scene), others_rows(scene, where.rows), others_reads(scene)
    assert len(traces_of_reads(scene)) == len(scene.checkpoints) * 2, "a file for each read"
    letters = [each for each in read_dead_letters(scene.log / "dead_letters") if each.detail == f"of {NEARLY}"]
    mine = sum(event.user_id == WHO for event in scene.events)

    outcome = forget(where, WHO, retain_s=0)

    assert outcome.remains == []
    wanted = {
        "rows emptied": 2,
        "events": mine,
        "dead_letters": 3,
        "quarantine": 1,
        "rows dropped": 2,
        "logged reads": 4,
    }
    assert {name: outcome.counts[name] for name in wanted} == wanted
    assert (traces(scene.log), traces(scene.state)) == ([], [])
    assert list(verify(where, WHO)) == []
    assert others_events(scene) == events
    assert others_rows(scene, where.rows) == rows
    assert (others_reads(scene), traces_of_reads(scene)) == (reads, [])
    found = read_dead_letters(scene.log / "dead_letters")
    assert [each for each in found if each.detail == f"of {NEARLY}"] == letters
    # Their places stay, so that as many records were refused as before.
    assert [each.offset for each in found] == list(range(6))
    assert [(each.key, each.value, each.detail) for each in found[:3]] == [(None, None, ERASED)] * 3


def test_in_redis_too(scene: Scene, key_file: Path, tmp_path: Path) -> None:
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis") as server, server.client() as client:
        store = StoreHandle(state=scene.state, redis=RedisSettings(url=server.url)).open()
        for checkpoint in scene.checkpoints:
            fill(store, checkpoint, scene.events, scene.log)
        where, before = places(scene, key_file, store), others_rows(scene, store)
        assert len(redis_traces(client)) == 4, "a row and an index of each checkpoint"
        assert sum("Redis" in found.where for found in verify(where, WHO)) == 4

        # The embedded store of this scene is a second one, which this command does not know.
        forget(places(scene, key_file), WHO, retain_s=0)
        assert forget(where, WHO, retain_s=0).counts["rows emptied"] == 2

        assert redis_traces(client) == []
        assert list(verify(where, WHO)) == []
        assert others_rows(scene, store) == before
        client.set("someone's:list", f"a, {WHO}, b")
        assert [found.what for found in verify(where, WHO)] == ['the value of b"someone\'s:list"']


def test_for_running_readers_old_files_and_the_fence_stay_and_the_next_run_ends_it(
    scene: Scene, key_file: Path
) -> None:
    where, now_ms = places(scene, key_file), time.time_ns() // 1_000_000
    held = DeltaTable(scene.log / "events")

    first = forget(where, WHO, WEEK_S, now_ms=now_ms)

    assert len(first.remains) == 1
    assert held.to_pyarrow_table().num_rows == len(scene.events), "an old version can be read"
    partition, offset = position(scene, key_file)
    for checkpoint in scene.checkpoints:
        (data,) = where.rows.get_rows(checkpoint.checkpoint_id, [WHO])
        row = decode_row(data, checkpoint.spec)
        assert (row.count, row.stamp.partition, row.stamp.offset) == (0, partition, offset)
    # A writer that read the row before, or nothing, is held back by the fence.
    old = [event for event in scene.events if event.user_id == WHO]
    fold_at(where.rows, scene.checkpoints[0], old[:3], [1, 2, 3])
    (data,) = where.rows.get_rows(scene.checkpoints[0].checkpoint_id, [WHO])
    assert decode_row(data, scene.checkpoints[0].spec).count == 0
    assert list(verify(where, WHO)) != []

    second = forget(where, WHO, 0, now_ms=now_ms + 1)

    assert position(scene, key_file) == (partition, offset), "the request is the same"
    assert second.remains == []
    assert list(verify(where, WHO)) == []
    assert (traces(scene.log), traces(scene.state)) == ([], [])


def stream(scene: Scene, start: str = "resume") -> None:
    plan = StreamPlan(
        log_path=scene.log / "events",
        checkpoint_path=scene.checkpoints[0].path,
        store=StoreHandle(state=scene.state, redis=None),
        dead_letters_path=scene.log / "dead_letters",
        start=start,
    )
    run(plan)


@pytest.mark.beam
def test_a_stream_from_the_first_event_on_brings_back_what_came_after_the_request_alone(
    scene: Scene, key_file: Path
) -> None:
    where = places(scene, key_file)
    forget(where, WHO, retain_s=0)
    partition, offset = position(scene, key_file)
    # An old copy of the user's events gets into the table again, at their own places.
    rows = DeltaTable(scene.log / "events").to_pyarrow_table().to_pylist()
    held = {row["offset"] for row in rows if row["partition"] == partition}
    free = [n for n in range(offset) if n not in held][:3]
    put_events(scene.log, partition, {n: later(n) for n in free})
    append_events(scene.log, [later(100)])

    stream(scene, "earliest")

    (data, other) = where.rows.get_rows(scene.checkpoints[0].checkpoint_id, [WHO, NEARLY])
    row = decode_row(data, scene.checkpoints[0].spec)
    assert (row.count, row.stamp.offset) == (1, offset + 1)
    assert decode_row(other, scene.checkpoints[0].spec).count == sum(e.user_id == NEARLY for e in scene.events)
    # The tombstone's place is no record, and no dead letter.
    assert len(read_dead_letters(scene.log / "dead_letters")) == 6


def test_who_came_back_is_kept_until_asked_again(scene: Scene, key_file: Path) -> None:
    where, checkpoint = places(scene, key_file), scene.checkpoints[0]
    forget(where, WHO, retain_s=0)
    partition, offset = position(scene, key_file)
    append_events(scene.log, [later(1)])
    known = read_forgotten(where.ref)
    fold_at(where.rows, checkpoint, [later(0), later(1)], [offset - 1, offset + 1], forgotten=known)

    outcome = forget(where, WHO, retain_s=0)

    assert (outcome.counts["events"], outcome.counts["rows emptied"], outcome.counts["rows dropped"]) == (0, 0, 0)
    (data,) = where.rows.get_rows(checkpoint.checkpoint_id, [WHO])
    assert decode_row(data, checkpoint.spec).count == 1
    assert len([user for user, _ in raw_users(scene.log) if user == WHO]) == 1

    outcome = forget(where, WHO, retain_s=0, again=True)

    assert (outcome.counts["events"], outcome.counts["rows emptied"]) == (1, 1)
    assert position(scene, key_file) == (partition, offset + 2)
    assert (traces(scene.log), traces(scene.state)) == ([], [])


@pytest.mark.parametrize("where_it_is", ["log", "dead letters", "training", "row", "sqlite page", "commit", "read"])
def test_a_planted_leftover_is_found(
    vql, scene: Scene, key_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where_it_is: str
) -> None:
    monkeypatch.delenv("VQL_REDIS_URL", raising=False)
    where = places(scene, key_file)
    forget(where, WHO, retain_s=0)
    (tmp_path / "work").mkdir()
    asked = ("forget", WHO, "--log", scene.log, "--state", scene.state, "--verify", "--also", tmp_path / "work")
    asked += ("--read-log", scene.read_log)
    assert vql(*asked).out == "nothing is left\n"
    if where_it_is == "log":
        append_events(scene.log, [later(0)])
    elif where_it_is == "dead letters":
        add_letters(scene.log / "more")
    elif where_it_is == "training":
        (tmp_path / "work" / "examples").write_bytes(b"\0\1" + WHO.encode() + b"\0")
    elif where_it_is == "row":
        fold_at(where.rows, scene.checkpoints[1], [later(0)], [10**6])
    elif where_it_is == "sqlite page":
        with (scene.state / "stray.db").open("wb") as file:
            file.write(b"\0\5" + WHO.encode() + b"0123456789abcdef" * 2)
    elif where_it_is == "read":
        add_reads(scene.read_log, where.rows, scene.checkpoints[0], [WHO], KEY)
    else:
        (scene.log / "events" / "_delta_log" / "x.json").write_text(f'{{"stats": "{{\\"max\\":\\"{WHO}\\"}}"}}')
    said = vql(*asked)
    assert said.code == 7
    assert said.out.startswith("left: ")
    assert said.out.count("; ") >= 1, "and its remedy is said"


def test_reads_that_another_key_hashed_are_told_because_they_may_be_the_users(scene: Scene, key_file: Path) -> None:
    where = places(scene, key_file)
    add_reads(scene.read_log, where.rows, scene.checkpoints[0], [WHO, NEARLY], KEY[::-1])
    outcome = forget(where, WHO, retain_s=0)
    assert outcome.counts["logged reads"] == 4
    assert [said.startswith("4 logged reads whose users another key hashed") for said in outcome.remains] == [True]
    assert [found.what for found in verify(where, WHO)] == ["4 reads whose users another key hashed"]


def test_a_dry_run_changes_nothing(vql, scene: Scene, key_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VQL_REDIS_URL", raising=False)
    before = sorted(scene.log.rglob("*"))
    said = vql("forget", WHO, "--log", scene.log, "--state", scene.state, "--dry-run")
    assert said.code == 0
    assert "2 rows" in said.out
    assert sorted(scene.log.rglob("*")) == before
    assert plan(places(scene, key_file), "nobody").counts["rows"] == 0


def test_without_a_key_or_the_right_log_it_is_refused_on_one_line(
    vql, scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ("forget", WHO, "--state", scene.state, "--log")
    assert_one_line(vql(*asked, scene.log / "none"), 2, "there is no log at")
    monkeypatch.setenv("VQL_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    assert_one_line(vql(*asked, scene.log, "--topic", "t"), 2, "was made from files: give no --topic")
    monkeypatch.delenv(KEY_FILE)
    assert_one_line(vql(*asked, scene.log), 2, KEY_FILE)


def test_whoever_writes_or_reads_a_log_of_forgotten_users_needs_the_key(
    scene: Scene, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forget(places(scene, key_file), WHO, retain_s=0)
    monkeypatch.delenv(KEY_FILE)
    with pytest.raises(InputError, match=KEY_FILE):
        stream(scene)


DYING = """
import os, signal, sys
from pathlib import Path

import jobs.forget as forget
import jobs.forget_tables as tables
from feature_repo.handle import StoreHandle

left = int(sys.argv[1])


def dying(step):
    def then(*given, **named):
        global left
        made = step(*given, **named)
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return made

    return then


for home, name in (
    (tables, "_change"), (tables, "_vacuum"), (tables, "_remove_commits"),
    (forget, "write_requests"), (forget, "empty_rows"), (forget, "drop_empty_rows"), (forget, "write_done"),
):
    setattr(home, name, dying(getattr(home, name)))
log, state, reads, key = map(Path, sys.argv[2:6])
rows = StoreHandle(state=state, redis=None).open()
places = forget.Places(log=log, state=state, rows=rows, key_file=key, read_log=reads)
forget.forget(places, sys.argv[6], 0.0)
"""


@pytest.mark.slow
def test_killed_after_any_step_and_run_again_it_is_done(scene: Scene, key_file: Path) -> None:
    where = places(scene, key_file)
    events, rows, reads = others_events(scene), others_rows(scene, where.rows), others_reads(scene)
    where.rows.close()
    ends, steps = [], 0
    # Each run goes on in what the one before it left, killed a step later or more.
    while ends[-1:] != [0]:
        steps += 1 + steps // 6
        given = [str(steps), scene.log, scene.state, scene.read_log, key_file, WHO]
        ends.append(subprocess.run([sys.executable, "-c", DYING, *map(str, given)], cwd=ROOT).returncode)

    assert ends[:-1] == [-signal.SIGKILL] * (len(ends) - 1)
    assert len(ends) > 8, "few steps would prove little"
    where = places(scene, key_file)
    assert (traces(scene.log), traces(scene.state)) == ([], [])
    assert list(verify(where, WHO)) == []
    assert (others_events(scene), others_rows(scene, where.rows)) == (events, rows)
    assert (others_reads(scene), traces_of_reads(scene)) == (reads, [])
    assert partition_of(later(0)) == position(scene, key_file)[0]
