"""Events from raw bytes: the poison table, what passes, and batches by column."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import EventError
from models.event import EVENT_TIME_MS_MAX, EVENT_TIME_MS_MIN, Event, check, hash_event_id, parse, parse_batch

TEXTS = ("event_id", "user_id", "item_id", "action")
GOOD = {
    "event_id": "e1",
    "user_id": "u1",
    "item_id": "i1",
    "action": "view",
    "event_time_ms": 1_600_000_000_000,
    "weight": 2.0,
}


def raw(**changes: object) -> bytes:
    return json.dumps(GOOD | changes).encode()


def raw_with(field: str, literal: str | bytes) -> bytes:
    """A good event with JSON text put in verbatim, so that it may be no JSON at all."""
    literal = literal if isinstance(literal, bytes) else literal.encode()
    return raw(**{field: "@@"}).replace(b'"@@"', literal)


def raw_without(field: str) -> bytes:
    return json.dumps({name: value for name, value in GOOD.items() if name != field}).encode()


POISON = {
    "nothing": (b"", "json"),
    "only spaces": (b"   ", "json"),
    "not json": (b"hello", "json"),
    "a cut object": (raw()[:-5], "json"),
    "trailing garbage": (raw() + b"x", "json"),
    "two objects": (raw() * 2, "json"),
    "single quotes": (raw().replace(b'"', b"'"), "json"),
    "a trailing comma": (raw()[:-1] + b",}", "json"),
    "a byte order mark": (b"\xef\xbb\xbf" + raw(), "json"),
    "utf-16": (raw().decode().encode("utf-16"), "json"),
    "zero bytes": (b"\0" * 100, "json"),
    "null": (b"null", "schema"),
    "an array": (b"[" + raw() + b"]", "schema"),
    "a number": (b"17", "schema"),
    "a string": (b'"e1"', "schema"),
    "an empty object": (b"{}", "schema"),
    **{f"{name} missing": (raw_without(name), "schema") for name in (*TEXTS, "event_time_ms")},
    **{f"{name} null": (raw(**{name: None}), "schema") for name in GOOD},
    **{f"{name} array": (raw(**{name: [GOOD[name]]}), "schema") for name in GOOD},
    **{f"{name} number": (raw(**{name: 5}), "schema") for name in TEXTS},
    **{f"{name} empty": (raw(**{name: ""}), "length") for name in TEXTS},
    **{f"{name} of 129 bytes": (raw(**{name: "x" * 129}), "length") for name in TEXTS},
    **{f"{name} of 65 two-byte letters": (raw(**{name: "é" * 65}), "length") for name in TEXTS},
    **{f"{name} of 4 KB": (raw(**{name: "x" * 4096}), "length") for name in TEXTS},
    **{f"{name} lone surrogate": (raw_with(name, '"\\ud800"'), "json") for name in TEXTS},
    **{f"{name} swapped surrogates": (raw_with(name, '"\\udc00\\ud800"'), "json") for name in TEXTS},
    **{f"{name} latin-1": (raw_with(name, b'"caf\xe9"'), "json") for name in TEXTS},
    **{f"{name} encoded surrogate": (raw_with(name, b'"\xed\xa0\x80"'), "json") for name in TEXTS},
    **{f"{name} control character": (raw_with(name, b'"a\nb"'), "json") for name in TEXTS},
    "time a string": (raw(event_time_ms="1600000000000"), "schema"),
    "time true": (raw(event_time_ms=True), "schema"),
    "time a fraction": (raw(event_time_ms=1.6e12 + 0.5), "schema"),
    "time 1e400": (raw_with("event_time_ms", "1e400"), "schema"),
    "time of 5000 digits": (raw_with("event_time_ms", "1" * 5000), "schema"),
    "time NaN": (raw_with("event_time_ms", "NaN"), "json"),
    "time in seconds": (raw(event_time_ms=1_600_000_000), "event_time"),
    "time in microseconds": (raw(event_time_ms=1_600_000_000_000_000), "event_time"),
    "time zero": (raw(event_time_ms=0), "event_time"),
    "time negative": (raw(event_time_ms=-1_600_000_000_000), "event_time"),
    "time 2^63": (raw(event_time_ms=2**63), "event_time"),
    "time 2^64 - 1": (raw(event_time_ms=2**64 - 1), "event_time"),
    "time one too early": (raw(event_time_ms=EVENT_TIME_MS_MIN - 1), "event_time"),
    "time one too late": (raw(event_time_ms=EVENT_TIME_MS_MAX), "event_time"),
    "weight NaN": (raw_with("weight", "NaN"), "json"),
    "weight Infinity": (raw_with("weight", "Infinity"), "json"),
    "weight -Infinity": (raw_with("weight", "-Infinity"), "json"),
    "weight 1e400": (raw_with("weight", "1e400"), "schema"),
    "weight of 400 digits": (raw_with("weight", "1" * 400), "schema"),
    "weight a string": (raw(weight="1"), "schema"),
    "weight zero": (raw(weight=0), "weight"),
    "weight minus zero": (raw_with("weight", "-0.0"), "weight"),
    "weight rounding to zero": (raw_with("weight", "1e-400"), "weight"),
    "weight over the limit": (raw(weight=1_000_001), "weight"),
    "weight under the limit": (raw(weight=-1e30), "weight"),
    "deep arrays": (b"[" * 100_000 + b"]" * 100_000, "schema"),
    "deep arrays in an extra field": (raw_with("extra", "[" * 100_000 + "]" * 100_000), "json"),
    "deep objects": (b'{"a":' * 100_000, "json"),
    "deep arrays as a user": (raw_with("user_id", "[" * 100_000), "schema"),
    "10 MB of junk": (b"x" * 10_000_000, "json"),
    "10 MB of spaces": (b" " * 10_000_000, "json"),
    "an id of 10 MB": (raw(event_id="x" * 10_000_000), "length"),
}


@pytest.mark.parametrize("name", POISON)
def test_poison_is_refused_with_its_reason(name):
    value, reason = POISON[name]
    with pytest.raises(EventError) as caught:
        parse(value)
    assert caught.value.reason == reason
    assert caught.value.detail
    caught.value.detail.encode()


def test_a_weight_that_float32_takes_for_zero_is_refused():
    with pytest.raises(EventError) as caught:
        parse(raw_with("weight", "1e-50"))
    assert caught.value.reason == "weight"


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_random_bytes_are_no_event(value):
    with pytest.raises(EventError):
        parse(value)


@settings(max_examples=200, deadline=None)
@given(st.integers(0, len(raw()) - 1), st.integers(1, 255))
def test_a_damaged_event_is_refused_or_is_still_within_the_contract(at, change):
    damaged = bytearray(raw())
    damaged[at] ^= change
    try:
        event = parse(bytes(damaged))
    except EventError:
        return
    assert check(event) is event


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(GOOD)), json_values)
def test_any_json_in_any_field_is_an_event_or_an_event_error(field, value):
    try:
        event = parse(raw(**{field: value}))
    except EventError:
        return
    assert getattr(event, field) == value


def test_a_good_event_passes_whole():
    assert parse(raw()) == Event(**GOOD)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("weight", -1.0),
        ("weight", 1e6),
        ("weight", 3),
        ("event_time_ms", EVENT_TIME_MS_MIN),
        ("event_time_ms", EVENT_TIME_MS_MAX - 1),
        ("item_id", "x" * 128),
        ("item_id", "é" * 64),
        ("user_id", "\U0001f600"),
        ("event_id", "a b\t\u0000"),
    ],
)
def test_values_at_the_edge_of_the_contract_pass(field, value):
    assert getattr(parse(raw(**{field: value})), field) == value


def test_the_weight_is_one_where_none_is_given():
    assert parse(raw_without("weight")).weight == 1.0


def test_unknown_fields_and_space_around_are_ignored():
    assert parse(b" \n" + raw(page=3, tags=["a", {"b": None}]) + b"\n") == Event(**GOOD)


def test_of_a_repeated_key_the_last_one_counts():
    assert parse(b'{"event_id": "first",' + raw()[1:]).event_id == "e1"


def test_seconds_are_named_as_the_likely_mistake():
    with pytest.raises(EventError, match=r"1600000000 is not Unix ms of 1973..2100 \(seconds\?\)"):
        parse(raw(event_time_ms=1_600_000_000))


def test_a_batch_keeps_the_order_and_the_offsets_of_events_and_rejects():
    values = [
        raw(event_id="a"),
        b"junk",
        raw(event_id="b", user_id="u2", weight=-1.5),
        raw(weight=0),
        raw(event_id="c"),
    ]
    columns, rejects = parse_batch(values, np.array([10, 11, 15, 16, 2**47], np.int64))
    assert len(columns) == 3
    assert columns.user_ids == ["u1", "u2", "u1"]
    assert (columns.item_ids, columns.actions) == (["i1"] * 3, ["view"] * 3)
    assert columns.offset_N.tolist() == [10, 15, 2**47]
    assert columns.time_ms_N.tolist() == [1_600_000_000_000] * 3
    assert columns.weight_N.tolist() == [2.0, -1.5, 2.0]
    assert columns.event_hash_N.tolist() == [hash_event_id(name) for name in "abc"]
    assert [(r.offset, r.reason, r.value) for r in rejects] == [(11, "json", b"junk"), (16, "weight", values[3])]


def test_a_batch_of_nothing_is_empty_columns():
    columns, rejects = parse_batch([], np.empty(0, np.int64))
    assert (len(columns), rejects) == (0, [])
    assert columns.weight_N.dtype == np.float32


def test_values_and_offsets_of_different_lengths_are_our_own_mistake():
    with pytest.raises(ValueError, match="shorter"):
        parse_batch([raw(), raw()], np.array([1], np.int64))


def test_the_hash_of_an_event_id_is_crc32_in_every_process():
    assert hash_event_id("123456789") == 0xCBF43926
