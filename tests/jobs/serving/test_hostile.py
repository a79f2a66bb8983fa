"""Bodies that are meant to break it, made from its own schema: never a 5xx, always one JSON object."""

from __future__ import annotations

import http.client
import json
from functools import lru_cache
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.jobs.serving.processes import Server

pytestmark = pytest.mark.slow

# Lone surrogates and control characters too: JSON can spell them.
TEXT = st.text(st.characters(), max_size=140)
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([2**63, -(2**63) - 1, 10**400, -1, 2**48]),
    st.floats(),
    TEXT,
)
JSON = st.recursive(ODD, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4))
HOSTILE = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@lru_cache(maxsize=1)
def schema(server_url: str) -> dict[str, Any]:
    import urllib.request

    with urllib.request.urlopen(f"{server_url}/openapi.json") as answer:
        return json.loads(answer.read())


def near(schemas: dict[str, Any], node: dict[str, Any]) -> st.SearchStrategy[Any]:
    """Values of this part of the schema, with odd ones in the place of some."""
    return st.one_of(sound(schemas, node), sound(schemas, node), sound(schemas, node), JSON)


def sound(schemas: dict[str, Any], node: dict[str, Any]) -> st.SearchStrategy[Any]:
    if "$ref" in node:
        return sound(schemas, schemas[node["$ref"].rsplit("/", 1)[-1]])
    if "anyOf" in node:
        return st.one_of(*(sound(schemas, each) for each in node["anyOf"]))
    match node.get("type"):
        case "object":
            fields = {name: near(schemas, each) for name, each in node["properties"].items()}
            required = {name: fields.pop(name) for name in node.get("required", [])}
            whole = st.fixed_dictionaries(required, optional=fields)
            return st.one_of(
                whole, whole, st.builds(lambda a, b: a | b, whole, st.dictionaries(TEXT, JSON, max_size=2))
            )
        case "array":
            return st.lists(near(schemas, node["items"]), min_size=node.get("minItems", 0), max_size=6)
        case "string":
            return st.one_of(st.sampled_from(["u1", "u2", "i1", "i7", "nothing"]), TEXT.filter(len))
        case "integer":
            return st.integers(node.get("minimum"), node.get("maximum"))
        case "null":
            return st.none()
    raise AssertionError(f"the schema has a part that this test does not know: {node}")


def assert_answered(server: Server, body: bytes, headers: dict[str, str] | None = None) -> int:
    status, answer = server.post(body, headers)
    assert status < 500, (status, answer, body)
    assert isinstance(answer, dict)
    assert ("error" in answer) == (status != 200)
    return status


def test_bodies_like_those_of_the_schema_never_break_it(server: Server):
    schemas = schema(server.url)["components"]["schemas"]
    seen = set()

    @HOSTILE
    @given(near(schemas, {"$ref": "#/components/schemas/RankRequest"}))
    def ask(value: Any) -> None:
        seen.add(assert_answered(server, json.dumps(value).encode()))

    ask()
    # The negative control of the strategy: some requests are sound, some are not.
    assert {200, 422} <= seen


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
