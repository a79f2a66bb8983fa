"""Pairs of strings found in what a server sends, however it is cut, and everything else refused."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import numpy as np
import pytest
from redis.exceptions import BusyLoadingError, InvalidResponse, MovedError, NoPermissionError, RedisError, ResponseError

from feature_repo import redis_answers
from feature_repo.redis_answers import PairAnswers
from models.row import RowBytes

Pair = tuple[bytes | None, bytes | None]


def sent(pairs: list[Pair]) -> bytes:
    def string(value: bytes | None) -> bytes:
        return b"$-1\r\n" if value is None else b"$%d\r\n%b\r\n" % (len(value), value)

    return b"".join(b"*2\r\n" + string(one) + string(other) for one, other in pairs)


def feed(answers: PairAnswers, data: bytes, at_once: int) -> None:
    while data:
        room = answers.room()[:at_once]
        size = min(len(room), len(data))
        room[:size] = data[:size]
        answers.received(size)
        data = data[size:]


@pytest.fixture
def pairs() -> list[Pair]:
    rng = np.random.default_rng(0)
    sizes = [0, 1, 9, 10, 99, 100, 1_000, 5_000, 3, 700]
    return [
        (None if n % 4 == 1 else rng.bytes(size), None if n % 3 == 1 else rng.bytes(n)) for n, size in enumerate(sizes)
    ]


@pytest.mark.parametrize("block_bytes", [64, 1_000, 1 << 20])
@pytest.mark.parametrize("at_once", [1, 2, 7, 100, 1 << 20])
def test_pairs_are_found_however_they_are_cut_and_whatever_fits_in_a_block(monkeypatch, pairs, block_bytes, at_once):
    monkeypatch.setattr(redis_answers, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(redis_answers, "RECEIVE_BYTES", block_bytes // 4)
    answers = PairAnswers(len(pairs))
    feed(answers, sent(pairs), at_once)
    assert len(answers) == len(pairs)
    assert [tuple(answers.pair(n)) for n in range(len(pairs))] == pairs
    expected = [None if f is None else RowBytes(folded=f, recent=r or b"") for f, r in pairs]
    assert list(answers.rows(0, len(pairs))) == expected
    assert answers.rows(2, 9)[1:4] == expected[3:6]


@pytest.fixture
def sockets() -> Iterator[tuple[socket.socket, socket.socket]]:
    """The server's and ours."""
    one, other = socket.socketpair()
    with one, other:
        yield one, other


@pytest.mark.parametrize("block_bytes", [64, 1_000, 1 << 20])
@pytest.mark.parametrize("at_once", [1, 7, 100, 1 << 13])
def test_a_socket_is_received_from_however_it_is_cut(monkeypatch, pairs, sockets, block_bytes, at_once):
    monkeypatch.setattr(redis_answers, "BLOCK_BYTES", block_bytes)
    monkeypatch.setattr(redis_answers, "RECEIVE_BYTES", block_bytes // 4)
    answers, data = PairAnswers(len(pairs)), sent(pairs)
    for at in range(0, len(data), at_once):
        sockets[0].sendall(data[at : at + at_once])
        while answers.receive(sockets[1].fileno(), len(pairs), 0.0) and len(answers) < len(pairs):
            pass
    assert [tuple(answers.pair(n)) for n in range(len(pairs))] == pairs


def test_what_comes_while_it_is_waited_for_is_received_in_one_call(pairs, sockets):
    answers, data = PairAnswers(len(pairs)), sent(pairs)
    middle = len(sent(pairs[:4])) + 3

    def send() -> None:
        for part in (data[:middle], data[middle:]):
            time.sleep(0.05)
            sockets[0].sendall(part)

    sender = threading.Thread(target=send)
    sender.start()
    assert answers.receive(sockets[1].fileno(), len(pairs), 30.0)
    sender.join()
    assert [tuple(answers.pair(n)) for n in range(len(pairs))] == pairs


def test_no_more_is_received_than_the_answers_that_are_wanted_now(monkeypatch, pairs, sockets):
    monkeypatch.setattr(redis_answers, "RECEIVE_BYTES", 8)
    answers = PairAnswers(len(pairs))
    sockets[0].sendall(sent(pairs))
    for wanted in (1, 2, 6):
        assert answers.receive(sockets[1].fileno(), wanted, 30.0)
        assert len(answers) == wanted


def test_where_nothing_comes_the_caller_is_told_so_whatever_the_cause(pairs, sockets):
    server, ours = sockets
    answers = PairAnswers(2)
    assert not answers.receive(ours.fileno(), 2, 0.0)
    assert not answers.receive(ours.fileno(), 2, 0.02)
    server.sendall(sent(pairs[2:3]))
    server.close()
    assert answers.receive(ours.fileno(), 2, 30.0)
    assert len(answers) == 1
    assert not answers.receive(ours.fileno(), 2, 30.0)
    ours.close()
    assert not answers.receive(ours.fileno(), 2, 30.0)


def test_an_error_is_raised_as_it_is_received(pairs, sockets):
    answers = PairAnswers(9)
    sockets[0].sendall(sent(pairs[:2]) + b"-NOPERM this user has no permissions\r\n")
    with pytest.raises(NoPermissionError, match="no permissions"):
        answers.receive(sockets[1].fileno(), 9, 30.0)
    assert len(answers) == 2


def test_an_answer_counts_from_its_last_byte_on(pairs):
    answers, whole = PairAnswers(2), sent(pairs[2:3])
    feed(answers, whole[:-1], 1 << 20)
    assert len(answers) == 0
    feed(answers, whole[-1:] + whole[:-1], 1 << 20)
    assert len(answers) == 1


@pytest.mark.parametrize("at_once", [1, 1 << 20])
@pytest.mark.parametrize(
    ("line", "kind", "says"),
    [
        (b"-ERR it broke\r\n", ResponseError, "it broke"),
        (b"-MOVED 3999 127.0.0.1:6381\r\n", MovedError, "3999"),
        (b"-NOPERM this user has no permissions\r\n", NoPermissionError, "no permissions"),
        (b"-LOADING Redis is loading the dataset in memory\r\n", BusyLoadingError, "loading"),
        (b"-" + b"x" * (1 << 13), ResponseError, "xxx"),
    ],
)
def test_an_error_in_place_of_a_pair_is_raised_by_its_name(pairs, line, kind, says, at_once):
    answers = PairAnswers(9)
    with pytest.raises(kind, match=says):
        feed(answers, sent(pairs[:2]) + line, at_once)
    assert len(answers) == 2


@pytest.mark.parametrize("at_once", [1, 1 << 20])
@pytest.mark.parametrize(
    "line",
    [
        b"+OK\r\n",
        b"*3\r\n$1\r\na\r\n",
        b"*-1\r\n",
        b"*2\r\n:1\r\n",
        b"*2\r\n$-2\r\n",
        b"*2\r\n$--1\r\n",
        b"*2\r\n$1_0\r\n",
        b"*2\r\n$\r\n",
        b"*2\r\n$ 1\r\n",
        b"*2\r\n$1\n\na\r\n",
        b"*2\r\n$1\r\ra\r\n",
        b"*2\r\n$536870913\r\n",
        b"*2\r\n$99999999999999999999\r\n",
        b"*2\r\n$1\r\nabc",
        b"*2\r\n$1\r\na\r\n$1\r\nb\r\r",
    ],
)
def test_what_is_not_of_the_protocol_is_refused(line, at_once):
    with pytest.raises(InvalidResponse, match="not of the protocol") as caught:
        feed(PairAnswers(2), line, at_once)
    assert isinstance(caught.value, RedisError)


def test_more_than_was_asked_for_is_refused(pairs):
    with pytest.raises(InvalidResponse):
        feed(PairAnswers(1), sent(pairs[:2]), 1 << 20)
