"""A server that is slow, away, locked or full: what a caller is told, and how soon."""

from __future__ import annotations

import signal
import socket
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from feature_repo.store import RowPut, run_out
from jobs.local_servers import free_port, free_ports
from models.errors import StoreError, UnavailableError
from models.row import RowBytes
from tests.faults.proxy import running_proxy
from tests.feature_repo.subjects import A, bytes_of, get, stamp, whole
from tests.redis_server import MEMORY_ONLY, RedisServer, running_redis

PASSWORD = "a-secret-of-the-tests"


@pytest.fixture
def server(tmp_path):
    """A server of the test's own, to be stopped and spoilt."""
    with running_redis(tmp_path) as own:
        yield own


def open_rows(server: RedisServer, **given) -> RedisRows:
    return RedisRows(RedisSettings(url=server.url, **{"timeout_s": 0.5, "retries": 1} | given))


def seconds_until_unavailable(call) -> float:
    started_s = time.monotonic()
    with pytest.raises(UnavailableError, match=r"127\.0\.0\.1:\d+ does not answer.*try again later"):
        call()
    return time.monotonic() - started_s


def test_a_server_that_was_never_there_is_unavailable_soon():
    rows = RedisRows(RedisSettings(url=f"redis://127.0.0.1:{free_port()}", timeout_s=0.5))
    assert seconds_until_unavailable(lambda: get(rows, "u")) < 10


def test_a_server_that_stops_is_unavailable_for_every_call_and_used_again_when_it_is_back(server):
    rows = open_rows(server)
    get(rows, "u")
    server.stop()
    for call in (
        lambda: get(rows, "u"),
        lambda: rows.put_rows(A, [whole("u", stamp(1))]),
        lambda: rows.commit_positions(A, 0, {0: 1}),
        lambda: rows.count_rows(A),
        lambda: rows.delete_user("u"),
    ):
        assert seconds_until_unavailable(call) < 5
    server.start()
    assert rows.put_rows(A, [whole("u", stamp(1))]) == [True]


def test_a_server_that_hangs_is_unavailable_in_bounded_time(server):
    rows = open_rows(server)
    rows.put_rows(A, [whole("u", stamp(1))])
    server.process.send_signal(signal.SIGSTOP)
    try:
        assert seconds_until_unavailable(lambda: rows.put_rows(A, [whole("u", stamp(2))])) < 5
    finally:
        server.process.send_signal(signal.SIGCONT)
    assert rows.put_rows(A, [whole("u", stamp(3))]) == [True]
    assert get(rows, "u") == bytes_of(whole("u", stamp(3)))


def test_a_short_absence_is_waited_for(server):
    rows = open_rows(server, retries=8)
    get(rows, "u")
    server.stop()
    back = threading.Timer(0.3, server.start)
    back.start()
    assert rows.put_rows(A, [whole("u", stamp(1))]) == [True]
    back.join()


def test_a_server_that_forgot_the_scripts_is_told_them_again(server):
    rows = open_rows(server)
    for n in range(3):
        with server.client() as client:
            client.script_flush()
        puts = [whole(f"u{user}", stamp(n)) for user in range(300)]
        assert rows.put_rows(A, puts) == [True] * 300
        with server.client() as client:
            client.script_flush()
        assert rows.count_rows(A) == 300
    assert rows.positions(A) == {}


def test_the_password_comes_from_its_file_and_a_wrong_one_is_not_tried_for_long(tmp_path):
    (tmp_path / "password").write_text(f"{PASSWORD}\n")
    (tmp_path / "wrong").write_text("guess")
    with running_redis(tmp_path, password=PASSWORD) as server:
        rows = open_rows(server, password_file=tmp_path / "password")
        assert rows.put_rows(A, [whole("u", stamp(1))]) == [True]
        for given in ({}, {"password_file": tmp_path / "wrong"}):
            with pytest.raises(StoreError, match="check VQL_REDIS_USERNAME and the file VQL_REDIS_PASSWORD_FILE") as e:
                get(open_rows(server, **given, retries=50), "u")
            assert not isinstance(e.value, UnavailableError)
            assert "guess" not in str(e.value)


def test_a_full_server_is_an_error_with_the_remedy_and_what_was_written_stays(server):
    rows = open_rows(server)
    rows.put_rows(A, [whole("u", stamp(1))])
    with server.client() as client:
        client.config_set("maxmemory", client.info("memory")["used_memory"])
    with pytest.raises(StoreError, match="raise its maxmemory") as caught:
        rows.put_rows(A, [whole(f"u{n}", stamp(2)) for n in range(100)])
    assert not isinstance(caught.value, UnavailableError)
    assert get(rows, "u") == bytes_of(whole("u", stamp(1)))


def test_a_replica_that_takes_no_writes_is_unavailable_until_it_is_promoted(server):
    rows = open_rows(server)
    rows.put_rows(A, [whole("u", stamp(1))])
    with server.client() as client:
        client.replicaof("127.0.0.1", free_port())
        assert seconds_until_unavailable(lambda: rows.put_rows(A, [whole("u", stamp(2))])) < 5
        assert get(rows, "u") is not None
        client.replicaof("NO", "ONE")
    assert rows.put_rows(A, [whole("u", stamp(2))]) == [True]


def test_one_primary_of_a_cluster_of_several_is_refused_with_the_remedy(tmp_path):
    bus = free_ports(2)
    options = [(*MEMORY_ONLY, "--cluster-enabled", "yes", "--cluster-port", str(port)) for port in bus]
    (tmp_path / "other").mkdir()
    with running_redis(tmp_path, options[0]) as server, running_redis(tmp_path / "other", options[1]) as other:
        with server.client() as one, other.client() as two:
            one.execute_command("CLUSTER ADDSLOTSRANGE", 0, 8000)
            two.execute_command("CLUSTER ADDSLOTSRANGE", 8001, 16383)
            one.execute_command("CLUSTER MEET", "127.0.0.1", other.port, bus[1])
            while any(node.execute_command("CLUSTER INFO")["cluster_state"] != "ok" for node in (one, two)):
                time.sleep(0.05)
        for each in (server, other):
            with pytest.raises(StoreError, match="use a single primary, with replicas") as caught:
                open_rows(each).put_rows(A, [whole(f"u{n}", stamp(1)) for n in range(100)])
            assert not isinstance(caught.value, UnavailableError)


def test_tls_is_spoken_and_a_plain_caller_is_refused_and_told_so(tmp_path):
    key, ca = tmp_path / "key.pem", tmp_path / "ca.pem"
    made = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    named = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(ca)]
    subprocess.run([*made, *named], check=True, capture_output=True)
    files = ("--tls-key-file", str(key), "--tls-cert-file", str(ca), "--tls-ca-cert-file", str(ca))
    with running_redis(tmp_path, (*MEMORY_ONLY, "--tls-auth-clients", "no", *files), tls_ca=ca) as server:
        rows = RedisRows(RedisSettings(url=server.url, ssl_ca_file=ca))
        assert rows.put_rows(A, [whole("u", stamp(1))]) == [True]
        with pytest.raises(StoreError, match="certificate"):
            get(RedisRows(RedisSettings(url=server.url, retries=0)), "u")
        plain = RedisRows(RedisSettings(url=server.url.replace("rediss:", "redis:"), retries=0))
        for call in (lambda: get(plain, "u"), lambda: plain.put_rows(A, [whole("u", stamp(2))])):
            with pytest.raises(UnavailableError, match="if it speaks TLS, its address begins with rediss://"):
                call()
        assert get(rows, "u") == bytes_of(whole("u", stamp(1)))
    with pytest.raises(UnavailableError) as caught:
        get(plain, "u")
    assert "rediss" not in str(caught.value)


def test_a_read_that_is_cut_off_in_the_middle_gives_every_part_again(server):
    rows = open_rows(server, retries=3, timeout_s=20)
    # More than the sockets of both sides hold, so that the cut is seen before the last part.
    puts = [RowPut(user_id=f"u{n}", stamp=stamp(n), recent=b"%d" % n, folded=b"x" * 500_000) for n in range(100)]
    rows.put_rows(A, puts)
    firsts: list[int] = []
    taken: list[RowBytes | None] = [None] * len(puts)

    def take(first: int, part: Sequence[RowBytes | None]) -> None:
        if not part:
            return
        if not firsts:
            with server.client() as client:
                client.client_kill_filter(_type="normal", skipme=True)
        firsts.append(first)
        taken[first : first + len(part)] = part

    run_out(rows.reading(A, [put.user_id for put in puts], take))
    assert taken == [bytes_of(put) for put in puts]
    assert firsts.count(0) == 2


def test_a_store_that_is_far_away_is_asked_in_two_turns(server):
    with running_proxy(server.port) as proxy:
        rows = RedisRows(RedisSettings(url=proxy.url, timeout_s=20))
        puts = [RowPut(user_id=f"u{n}", stamp=stamp(n), recent=b"%d" % n, folded=b"x") for n in range(100)]
        rows.put_rows(A, puts)
        get(rows, "u1")
        proxy.late_s, before = (0.02, 0.02), proxy.answers
        assert rows.get_rows(A, [put.user_id for put in puts]) == [bytes_of(put) for put in puts]
        # The answers to the first two sends, which are asked for one behind the other, may count twice.
        assert proxy.answers - before <= 3
        rows.close()


def test_a_row_larger_than_what_is_received_at_once_comes_whole(server):
    rows = open_rows(server, timeout_s=20)
    sizes = {"small": 10, "large": 5_000_003, "after": 3_000}
    puts = [
        RowPut(user_id=u, stamp=stamp(1), recent=b"r", folded=bytes(range(250)) * (n // 10)) for u, n in sizes.items()
    ]
    rows.put_rows(A, puts)
    assert rows.get_rows(A, [*sizes, "nobody"]) == [*map(bytes_of, puts), None]


def test_a_connection_that_the_server_closed_meanwhile_is_left(server):
    rows = open_rows(server, retries=0, timeout_s=20)
    rows.put_rows(A, [whole("u", stamp(1))])
    for _ in range(3):
        assert get(rows, "u") == bytes_of(whole("u", stamp(1)))
        with server.client() as client:
            client.client_kill_filter(_type="normal", skipme=True)


def test_a_connection_that_another_thread_closes_is_not_taken_for_what_is_opened_next(server):
    rows = open_rows(server, retries=3, timeout_s=20)
    # So few that all are asked for at once: a second send would find the connection closed.
    puts = [RowPut(user_id=f"u{n}", stamp=stamp(n), recent=b"%d" % n, folded=b"x" * 50_000) for n in range(20)]
    rows.put_rows(A, puts)
    rows.get_rows(A, ["u0"])
    link = rows._opened.link
    number, others = link._idle[0]._sock.fileno(), []
    taken: list[RowBytes | None] = [None] * len(puts)

    def take(first: int, part: Sequence[RowBytes | None]) -> None:
        if not part and not others:
            link._client.connection_pool.disconnect()
            while number not in [each.fileno() for each in others]:
                others.extend(socket.socketpair())
            at = [each.fileno() for each in others].index(number)
            others[at ^ 1].sendall(b"*2\r\n$7\r\nanother\r\n$7\r\nanother\r\n" * 21)
        taken[first : first + len(part)] = part

    run_out(rows.reading(A, [put.user_id for put in puts], take))
    for each in others:
        each.close()
    assert taken == [bytes_of(put) for put in puts]


def test_reads_leave_no_descriptor_behind(server):
    def opened() -> int:
        return sum(1 for _ in Path("/proc/self/fd").iterdir())

    rows = open_rows(server, retries=0)
    rows.put_rows(A, [whole("u", stamp(1))])
    get(rows, "u")
    before = opened()
    for _ in range(5):
        get(rows, "u")
    server.stop()
    for _ in range(5):
        seconds_until_unavailable(lambda: get(rows, "u"))
    # The server's end of it is gone, and so is ours.
    assert opened() <= before
