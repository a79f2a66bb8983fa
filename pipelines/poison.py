"""Bad records of every kind that producers make, for tests and benchmarks: what each is, and the reason it gets.

Each is one mistake in an otherwise sound event of user USER, so that a check which is missing lets it through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from models.event import Event

USER = "poisoned"
TIME_MS = 1_600_000_000_000
LARGE_BYTES = 10_000_000
_SOUND = msgspec.json.encode(
    Event(event_id="e", user_id=USER, item_id="i1", action="view", event_time_ms=TIME_MS, weight=1.0)
)
Record = tuple[bytes | None, bytes | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Poison:
    """A bad record and the reason of its dead letter. log_time_ms: the record's own timestamp."""

    name: str
    reason: str
    value: bytes | None
    key: bytes | None = USER.encode()
    log_time_ms: int = TIME_MS


def corpus() -> list[Poison]:
    """One of each kind, the one of ten megabytes included."""
    return [*_no_json(), *_no_schema(), *_out_of_contract(), *_wrong_records()]


def small_corpus() -> list[Poison]:
    """Those of less than ten kilobytes: what a log holds a few of in every hundred."""
    return [poison for poison in corpus() if len(poison.value or b"") < 10_000]


def poisoned(records: Sequence[Record], share: float, seed: int) -> list[Record]:
    """The (key, value) records, in their order, with poison between them: `share` (0 to below 1) of the whole."""
    rng = np.random.default_rng(seed)
    bad = small_corpus()
    count = round(len(records) * share / (1 - share))
    before_N = np.sort(rng.integers(0, len(records) + 1, count)).tolist()
    mixed: list[Record] = []
    start = 0
    for place, kind in zip(before_N, rng.integers(0, len(bad), count).tolist(), strict=True):
        mixed += records[start:place]
        mixed.append((bad[kind].key, bad[kind].value))
        start = place
    return [*mixed, *records[start:]]


def _no_json() -> list[Poison]:
    deep = 10_000
    values = {
        "empty": b"",
        "cut off": _SOUND[:40],
        "trailing letters": _SOUND + b" x",
        "two events": _SOUND * 2,
        "a byte order mark": b"\xef\xbb\xbf" + _SOUND,
        "UTF-16": _SOUND.decode().encode("utf-16"),
        "not UTF-8": _with(item_id=b'"\xff\xfe"'),
        "half a surrogate pair": _with(item_id=rb'"\ud800"'),
        "a control letter": _with(item_id=b'"a\x00b"'),
        "compressed": b"\x1f\x8b\x08\x00" + bytes(range(64)),
        "NaN": _with(weight=b"NaN"),
        "Infinity": _with(weight=b"Infinity"),
        "-Infinity": _with(weight=b"-Infinity"),
        "nested objects": b'{"a":' * deep + b"1" + b"}" * deep,
        "nested lists in an unknown field": _SOUND[:-1] + b',"x":' + b"[" * deep + b"]" * deep + b"}",
    }
    return [Poison(name=name, reason="json", value=value) for name, value in values.items()]


def _no_schema() -> list[Poison]:
    values = {
        "null": b"null",
        "a number": b"17",
        "a string": b'"event"',
        "a list": b"[" + _SOUND + b"]",
        "nested lists": b"[" * 10_000 + b"]" * 10_000,
        "an empty object": b"{}",
        "a user id that is a number": _with(user_id=b"17"),
        "an event id that is null": _with(event_id=b"null"),
        "an item id that is a list": _with(item_id=b"[]"),
        "a time that is a string": _with(event_time_ms=b'"1600000000000"'),
        "a time that is a fraction": _with(event_time_ms=b"1600000000000.5"),
        "a time beyond numbers": _with(event_time_ms=b"1e400"),
        "a weight that is a string": _with(weight=b'"1"'),
        "a weight that is true": _with(weight=b"true"),
        "a weight that is null": _with(weight=b"null"),
        "a weight beyond numbers": _with(weight=b"1e999"),
    }
    values |= {f"without {name}": _without(name) for name in Event.__struct_fields__ if name != "weight"}
    return [Poison(name=name, reason="schema", value=value) for name, value in values.items()]


def _out_of_contract() -> list[Poison]:
    times = {
        "seconds": TIME_MS // 1000,
        "microseconds": TIME_MS * 1000,
        "zero": 0,
        "negative": -TIME_MS,
        "2^63 - 1": 2**63 - 1,
        "2^63": 2**63,
        "-2^63": -(2**63),
        "2^64": 2**64,
    }
    weights = {"zero": b"0", "minus zero": b"-0.0", "too small": b"1e-7", "too large": b"1e7", "denormal": b"5e-324"}
    ids = ("event_id", "user_id", "item_id", "action")
    lengths = {"empty": "", "of 4 KB": "x" * 4096, "of 129 bytes in 65 letters": "é" * 64 + "x"}
    return [
        *(
            Poison(name=f"time {n}", reason="event_time", value=_with(event_time_ms=b"%d" % t))
            for n, t in times.items()
        ),
        *(Poison(name=f"weight {n}", reason="weight", value=_with(weight=w)) for n, w in weights.items()),
        *(
            Poison(
                name=f"{field} {name}",
                reason="length",
                value=_with(**{field: msgspec.json.encode(text)}),
                key=text.encode() if field == "user_id" else USER.encode(),
            )
            for field in ids
            for name, text in lengths.items()
        ),
    ]


def _wrong_records() -> list[Poison]:
    padded = _SOUND[:-1] + b',"x":"' + b"a" * LARGE_BYTES + b'"}'
    return [
        Poison(name="an event of 10 MB", reason="size", value=padded[:-2][: LARGE_BYTES - 2] + b'"}'),
        Poison(name="10 MB of nothing", reason="size", value=b"\x00" * LARGE_BYTES),
        Poison(name="another user's key", reason="key", value=_SOUND, key=b"another"),
        Poison(name="an empty key", reason="key", value=_SOUND, key=b""),
        Poison(name="a key that is not UTF-8", reason="key", value=_SOUND, key=b"\xff"),
        Poison(name="a tombstone without key", reason="key", value=None, key=None),
        Poison(name="a tombstone with an empty key", reason="key", value=None, key=b""),
        Poison(name="a tombstone with a key of 4 KB", reason="key", value=None, key=b"k" * 4096),
        Poison(name="a tombstone with a key that is not UTF-8", reason="key", value=None, key=b"\xff"),
        Poison(name="a time an hour ahead", reason="future", value=_with(event_time_ms=b"%d" % (TIME_MS + 3_600_000))),
    ]


def _with(**fields: bytes) -> bytes:
    """The sound event with these fields' JSON."""
    parts = {name: msgspec.json.encode(value) for name, value in msgspec.json.decode(_SOUND).items()} | fields
    return b"{" + b",".join(b'"%s":%s' % (name.encode(), value) for name, value in parts.items()) + b"}"


def _without(field: str) -> bytes:
    return msgspec.json.encode({name: v for name, v in msgspec.json.decode(_SOUND).items() if name != field})
