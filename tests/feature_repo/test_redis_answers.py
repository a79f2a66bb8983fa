"""Pairs of strings found in what a server sends, however it is cut, and everything else refused."""

from __future__ import annotations

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
