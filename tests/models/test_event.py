"""Events from raw bytes: the poison table, what passes, and batches by column."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from models.errors import EventError
from models.event import (
    EVENT_TIME_MS_MAX,
    EVENT_TIME_MS_MIN,
    REASONS,
    UNKNOWN_TIME,
    Event,
    Records,
    check,
    hash_event_id,
    parse,
    parse_batch,
)

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
    "deep arrays": (b"[" * 10_000 + b"]" * 10_000, "schema"),
    "deep arrays in an extra field": (raw_with("extra", "[" * 10_000 + "]" * 10_000), "json"),
    "deep objects": (b'{"a":' * 10_000, "json"),
    "deep arrays as a user": (raw_with("user_id", "[" * 10_000), "schema"),
    "10 MB of junk": (b"x" * 10_000_000, "size"),
    "10 MB of spaces": (b" " * 10_000_000, "size"),
    "an id of 10 MB": (raw(event_id="x" * 10_000_000), "size"),
    "10 MB beside a good event": (raw(more="x" * 10_000_000), "size"),
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


def records(values, offsets=None, keys=None, log_times=None) -> Records:
    count = len(values)
    return Records(
        epoch=0,
        partition=0,
        offset_N=np.array(range(count) if offsets is None else offsets, np.int64),
        log_time_ms_N=np.array([UNKNOWN_TIME] * count if log_times is None else log_times, np.int64),
        keys=[None] * count if keys is None else keys,
        values=values,
    )


def test_a_batch_keeps_the_order_and_the_offsets_of_events_and_rejects():
    values = [
        raw(event_id="a"),
        b"junk",
        raw(event_id="b", user_id="u2", weight=-1.5),
        raw(weight=0),
        raw(event_id="c"),
    ]
    columns, rejects = parse_batch(records(values, [10, 11, 15, 16, 2**47]))
    assert len(columns) == 3
    assert columns.user_ids == ["u1", "u2", "u1"]
    assert (columns.item_ids, columns.actions) == (["i1"] * 3, ["view"] * 3)
    assert columns.offset_N.tolist() == [10, 15, 2**47]
    assert columns.time_ms_N.tolist() == [1_600_000_000_000] * 3
    assert columns.weight_N.tolist() == [2.0, -1.5, 2.0]
    assert columns.event_hash_N.tolist() == [hash_event_id(name) for name in "abc"]
    assert [(r.offset, r.reason, r.value) for r in rejects] == [(11, "json", b"junk"), (16, "weight", values[3])]


@pytest.mark.parametrize("name", POISON)
def test_a_batch_refuses_what_one_record_alone_is_refused_for(name):
    value, reason = POISON[name]
    columns, rejects = parse_batch(records([raw(event_id="a"), value, raw(event_id="b")]))
    assert columns.event_ids == ["a", "b"]
    assert [(r.offset, r.reason, r.value) for r in rejects] == [(1, reason, value)]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.binary(max_size=60) | st.just(raw()) | st.none(), max_size=8), st.binary(max_size=8) | st.none())
def test_any_bytes_are_an_event_or_a_reject_with_a_known_reason(values, key):
    columns, rejects = parse_batch(records(values, keys=[key] * len(values)))
    assert sorted([*columns.offset_N.tolist(), *(r.offset for r in rejects)]) == list(range(len(values)))
    assert {r.reason for r in rejects} <= set(REASONS)


def test_ids_of_other_letters_are_measured_in_bytes():
    values = [raw(item_id="é" * 64), raw(item_id="é" * 65), raw(user_id="é")]
    columns, rejects = parse_batch(records(values))
    assert columns.offset_N.tolist() == [0, 2]
    assert [(r.offset, r.reason) for r in rejects] == [(1, "length")]


def test_a_key_that_is_not_the_user_is_refused_and_no_key_is_not():
    values = [raw(), raw(), raw(user_id="é"), raw(user_id="é")]
    columns, rejects = parse_batch(records(values, keys=[b"u1", None, "é".encode(), b"\xff"]))
    assert columns.offset_N.tolist() == [0, 1, 2]
    assert [(r.reason, r.key) for r in rejects] == [("key", b"\xff")]
    assert [r.reason for r in parse_batch(records([raw()], keys=[b"u2"]))[1]] == ["key"]


def test_a_record_without_a_value_is_a_tombstone_of_the_user_of_its_key():
    keys = [b"u1", None, b"", b"\xff", b"x" * 129]
    columns, rejects = parse_batch(records([None] * 5, keys=keys))
    assert (columns.user_ids, columns.weight_N.tolist(), columns.offset_N.tolist()) == (["u1"], [0.0], [0])
    assert [(r.offset, r.reason, r.value) for r in rejects] == [(n, "key", None) for n in (1, 2, 3, 4)]


def test_an_event_too_far_after_its_record_is_refused():
    at = 1_600_000_000_000
    columns, rejects = parse_batch(records([raw()] * 4, log_times=[at - 600_000, at - 600_001, at, UNKNOWN_TIME]))
    assert columns.offset_N.tolist() == [0, 2, 3]
    assert [(r.offset, r.reason, r.log_time_ms) for r in rejects] == [(1, "future", at - 600_001)]
    assert not parse_batch(records([raw()], log_times=[at - 9_000_000]), future_ms_max=9_000_000)[1]


def test_a_batch_of_nothing_is_empty_columns():
    columns, rejects = parse_batch(records([]))
    assert (len(columns), rejects) == (0, [])
    assert columns.weight_N.dtype == np.float32


def test_the_hash_of_an_event_id_is_crc32_in_every_process():
    assert hash_event_id("123456789") == 0xCBF43926
