"""The users of deploy/redis/users.acl on a real server: each may do all that it has to, and nothing else."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import redis

from feature_repo import redis_scripts
from feature_repo.condition import examine
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows, packed_stamp, row_key
from feature_repo.store import Backfill
from models.errors import MachineError, StoreError, UnavailableError
from tests.feature_repo.rows import put_all, small_rows
from tests.feature_repo.subjects import A, bytes_of, get, partial, stamp, whole
from tests.redis_server import MEMORY_ONLY, PERSISTENT, RedisServer, running_redis

USERS = Path(__file__).parents[2] / "deploy/redis/users.acl"
PASSWORDS = {name: f"the-{name}-of-these-tests" for name in ("reader", "writer", "admin")}
OF_WRITERS = (
    redis_scripts.PUT_ROWS,
    redis_scripts.TALLY,
    redis_scripts.COMMIT_POSITIONS,
    redis_scripts.RECORD_BACKFILL,
)


def filled() -> str:
    """The file with the passwords' digests in their places, as deploy/README.md says."""
    text = USERS.read_text()
    for name, password in PASSWORDS.items():
        text = text.replace(f"${{VQL_{name.upper()}_SHA256}}", hashlib.sha256(password.encode()).hexdigest())
    return text


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    folder = tmp_path_factory.mktemp("users")
    (folder / "users.acl").write_text(filled())
    for name, password in PASSWORDS.items():
        (folder / name).write_text(password)
    options = (*PERSISTENT, "--aclfile", str(folder / "users.acl"))
    with running_redis(folder, options, PASSWORDS["admin"], username="vql-admin") as running:
        yield running


@pytest.fixture(autouse=True)
def _empty(server: RedisServer) -> None:
    with server.client() as admin:
        admin.flushall()
        admin.script_flush()


def rows_as(server: RedisServer, name: str, **given) -> RedisRows:
    settings = {"username": f"vql-{name}", "password_file": server.folder / name, "retries": 0} | given
    return RedisRows(RedisSettings(url=server.url, **settings))


def said_to(server: RedisServer, name: str, command: tuple) -> str:
    """What the server answers to this user's command, if it is no success."""
    with redis.Redis(port=server.port, username=f"vql-{name}", password=PASSWORDS[name]) as client:
        try:
            client.execute_command(*command)
        except redis.ResponseError as error:
            return f"{type(error).__name__}: {error}"
    return ""


# What neither may do. The store's own keys, wherever a command takes one: it is the command that is refused.
REFUSED = [
    ("FLUSHALL",),
    ("FLUSHDB",),
    ("SCAN", 0),
    ("KEYS", "vql:*"),
    ("RANDOMKEY",),
    ("CONFIG", "SET", "maxmemory-policy", "allkeys-lru"),
    ("CONFIG", "GET", "*"),
    ("EVAL", "return 1", 0),
    ("SCRIPT", "FLUSH"),
    ("SCRIPT", "KILL"),
    ("ACL", "SETUSER", "vql-reader", "+@all"),
    ("ACL", "LIST"),
    ("SHUTDOWN", "NOSAVE"),
    ("REPLICAOF", "NO", "ONE"),
    ("BGREWRITEAOF",),
    ("CLIENT", "LIST"),
    ("MONITOR",),
    ("SAVE",),
    ("SWAPDB", 0, 1),
    ("DEL", redis_scripts.GENERATION),
    ("RENAME", redis_scripts.GENERATION, "vql:x"),
    ("MIGRATE", "127.0.0.1", 1, redis_scripts.GENERATION, 0, 10),
    ("PUBLISH", "c", "m"),
    ("GET", "another program's"),
]
WRITES = [
    ("SET", redis_scripts.GENERATION, "x"),
    ("HSET", row_key(A, "u"), "s", "x"),
    ("PEXPIREAT", row_key(A, "u"), 1),
    ("ZADD", "vql:{0}:users:x", 1, "u"),
    ("SCRIPT", "LOAD", "return 1"),
    *(("EVALSHA", script.sha, 0) for script in redis_scripts.SCRIPTS),
]


@pytest.mark.parametrize("name", ["reader", "writer"])
@pytest.mark.parametrize("command", REFUSED, ids=lambda command: " ".join(map(str, command[:2])))
def test_neither_reader_nor_writer_may_administrate(server: RedisServer, name: str, command: tuple) -> None:
    assert said_to(server, name, command).startswith("NoPermissionError")


@pytest.mark.parametrize("command", WRITES, ids=lambda command: " ".join(map(str, command[:2])))
def test_a_reader_may_not_write(server: RedisServer, command: tuple) -> None:
    assert said_to(server, "reader", command).startswith("NoPermissionError")


def test_a_readers_put_is_refused_with_the_remedy_and_changes_nothing(server: RedisServer) -> None:
    rows_as(server, "writer").put_rows(A, [whole("u", stamp(1))])
    reader = rows_as(server, "reader")
    for write in (
        lambda: reader.put_rows(A, [whole("u", stamp(2))]),
        lambda: reader.commit_positions(A, 0, {0: 2}),
        lambda: reader.delete_user("u"),
        lambda: reader.delete_checkpoint(A),
    ):
        with pytest.raises(StoreError, match=r"give this user the rights that deploy/redis/users\.acl") as caught:
            write()
        assert not isinstance(caught.value, UnavailableError)
    assert get(reader, "u") == bytes_of(whole("u", stamp(1)))


def test_a_writer_runs_the_projects_scripts_and_no_other(server: RedisServer) -> None:
    own = "redis.call('DEL', KEYS[1])"
    assert said_to(server, "writer", ("SCRIPT", "LOAD", own)) == ""
    digest = hashlib.sha1(own.encode(), usedforsecurity=False).hexdigest()
    assert said_to(server, "writer", ("EVALSHA", digest, 1, "vql:x")).startswith("NoPermissionError")
    for script in (redis_scripts.DELETE_ROW, redis_scripts.DELETE_SOME):
        assert said_to(server, "writer", ("SCRIPT", "LOAD", script.text)) == ""
        assert said_to(server, "writer", ("EVALSHA", script.sha, 2, "vql:x", "vql:y", "u")).startswith("NoPerm")
    # The project's own, and keys that are not.
    rows_as(server, "writer").put_rows(A, [whole("u", stamp(1))])
    call = (0, 0, "any", packed_stamp(stamp(1)), b"", b"r", b"f")
    put = ("EVALSHA", redis_scripts.PUT_ROWS.sha, 2, "vql:{0}:users:x", "another program's", *call)
    assert said_to(server, "writer", put).startswith("NoPermissionError")


def test_a_user_that_may_run_scripts_and_not_load_them_is_told_so(server: RedisServer) -> None:
    rows_as(server, "writer").put_rows(A, [whole("u", stamp(1))])
    with server.client() as admin:
        admin.script_flush()
        password = f">{PASSWORDS['writer']}"
        admin.execute_command("ACL SETUSER", "vql-mute", "on", password, "~vql:*", "+@all", "-script")
    mute = rows_as(server, "writer", username="vql-mute")
    with pytest.raises(StoreError, match="may not load the scripts: give it SCRIPT LOAD"):
        mute.delete_user("u")
    with pytest.raises(StoreError, match=r"'script.*give this user the rights"):
        mute.put_rows(A, [whole("u", stamp(2))])


def test_the_scripts_that_a_writer_may_run_are_those_of_this_version() -> None:
    (writer,) = (line for line in USERS.read_text().splitlines() if line.startswith("user vql-writer "))
    assert set(re.findall(r"\+evalsha\|(\w+)", writer)) == {script.sha for script in OF_WRITERS}
    assert "evalsha" not in USERS.read_text().replace(writer, "")


def test_a_reader_reads_all_that_a_ranker_asks_for(server: RedisServer, checkpoint, fold) -> None:
    stored = small_rows(checkpoint, fold, 300)
    put_all(rows_as(server, "writer"), checkpoint, stored)
    rows = rows_as(server, "reader")
    reader = Reader(rows, Opened(checkpoint))
    assert reader.read([*stored, "nobody"]).missing == {"nobody": "absent"}
    reader.close()
    assert rows.count_rows(checkpoint.checkpoint_id) == len(stored)
    assert rows.progress(checkpoint.checkpoint_id).begun


@pytest.mark.parametrize("ttl_s", [None, 60.0])
def test_a_writer_does_all_that_a_backfill_and_a_stream_ask_for(server: RedisServer, ttl_s: float | None) -> None:
    rows, record = rows_as(server, "writer", ttl_s=ttl_s), Backfill(epoch=0, cut={0: 1}, users=1, events=1, log="l")
    assert (rows.positions(A), rows.backfill(A), rows.count_rows(A), rows.checkpoint_ids()) == ({}, None, 0, [])
    assert rows.bind_log(A, 0, "topic") == "topic"
    assert rows.put_rows(A, [whole(f"u{n}", stamp(1)) for n in range(300)]) == [True] * 300
    rows.record_backfill(A, record)
    assert rows.put_rows(A, [partial("u0", stamp(2), follows=stamp(1)), whole("new", stamp(2))]) == [True, True]
    rows.commit_positions(A, 0, {0: 2})
    with server.client() as admin:
        admin.script_flush()
    assert rows.put_rows(A, [whole("u1", stamp(3), follows=stamp(1))]) == [True]
    # A time to live is taken back by a writer without one.
    assert rows_as(server, "writer").put_rows(A, [partial("u2", stamp(2), follows=stamp(1))]) == [True]
    assert (rows.positions(A), rows.backfill(A), rows.count_rows(A)) == ({0: (0, 2)}, record, 301)
    assert rows.checkpoint_ids() == [A]
    found = examine(rows, A)
    assert (found.faults, found.facts["persistence"]) == ([], "append-only file, snapshots unknown")


def test_an_administrator_erases(server: RedisServer) -> None:
    rows_as(server, "writer").put_rows(A, [whole(user, stamp(1)) for user in ("u", "v", "w")])
    admin = rows_as(server, "admin")
    assert admin.delete_user("u") == 1
    assert admin.delete_checkpoint(A) == 2
    admin.remove()


def test_nobody_comes_in_without_a_name_and_a_password(server: RedisServer) -> None:
    for settings in (
        RedisSettings(url=server.url),
        RedisSettings(url=server.url, password_file=server.folder / "admin"),
    ):
        with pytest.raises(StoreError, match="check VQL_REDIS_USERNAME and the file VQL_REDIS_PASSWORD_FILE"):
            get(RedisRows(settings), "u")


def test_a_server_does_not_start_with_the_file_before_passwords_are_filled_in(tmp_path: Path) -> None:
    unfilled = running_redis(tmp_path, (*MEMORY_ONLY, "--aclfile", str(USERS)))
    with pytest.raises(MachineError, match=r"users\.acl:2"), unfilled:
        pass
