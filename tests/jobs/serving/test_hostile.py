"""Bodies that are meant to break it: never a 5xx, always one JSON object."""

from __future__ import annotations

import http.client
import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.jobs.serving.processes import Server

pytestmark = pytest.mark.slow

HOSTILE = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


def assert_answered(server: Server, body: bytes, headers: dict[str, str] | None = None) -> int:
    status, answer = server.post(body, headers)
    assert status < 500, (status, answer, body)
    assert isinstance(answer, dict)
    assert ("error" in answer) == (status != 200)
    return status


def test_bytes_of_any_kind_never_break_it(server: Server):
    @HOSTILE
    @given(st.binary(max_size=300), st.sampled_from(["application/json", "text/plain", "application/x+json", "", "é"]))
    def ask(body: bytes, kind: str) -> None:
        assert_answered(server, body, {"Content-Type": kind})

    ask()


@pytest.mark.parametrize(
    "body",
    [
        b'{"users": [{"user_id": "u1", "candidates": ["i1"]}], "now_ms": NaN}',
        b'{"users": [{"user_id": "u1", "candidates": ["i1"]}], "now_ms": 1e999}',
        b'{"users": [{"user_id": "u1", "candidates": ["i1"]}], "now_ms": ' + b"9" * 5000 + b"}",
        b'{"users": [{"user_id": "\\ud800", "candidates": ["i1"]}]}',
        b'{"users": [{"user_id": "u1", "candidates": ["\\udfff"]}]}',
        b'{"\\ud800": 1, "users": [{"user_id": "u1", "candidates": ["i1"]}]}',
        b'{"users": [{"user_id": "\\u0000", "candidates": ["\\u0000"]}]}',
        b'{"users": ' + b"[" * 5000 + b"]" * 5000 + b"}",
        b'{"users": [' + b"1," * 400_000 + b"1]}",
        b'{"users": [{"user_id": "u1", "candidates": [' + b'"",' * 300_000 + b'""]}]}',
        b"\xff\xfe{}",
        b"\xef\xbb\xbf{}",
    ],
    ids=range(12),
)
def test_known_tricks_are_refused_or_answered(server: Server, body: bytes):
    assert_answered(server, body)


@pytest.mark.parametrize("now_ms", [0, 1, 2**48 - 1])
def test_the_ends_of_time_are_scored_with_numbers(server: Server, now_ms: int):
    answer = server.rank({"u0": ["i1", "i2"]}, now_ms)
    assert all(isinstance(score, float) for score in answer["users"][0]["scores"])


def test_a_body_in_chunks_is_limited_too(server: Server):
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    try:
        connection.request(
            "POST", "/rank", iter([b" " * 65536] * 17), {"Content-Type": "application/json"}, encode_chunked=True
        )
        answer = connection.getresponse()
        assert answer.status == 413
        assert "more than 1,048,576 bytes" in json.loads(answer.read())["error"]
    finally:
        connection.close()
