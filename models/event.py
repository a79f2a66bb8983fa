"""One behaviour as it travels on the log, and how raw bytes become checked columns.

An event is a JSON object (UTF-8) keyed by user_id:

    {"event_id": "b1-7", "user_id": "u1", "item_id": "p9", "action": "purchase",
     "event_time_ms": 1483271606000, "weight": 1.0}

`weight` defaults to 1; a negative weight retracts an earlier event: same item, action, event_time_ms and
size of weight.
Knows the contract of an event and nothing of where it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from zlib import crc32

import msgspec
import numpy as np
from jaxtyping import Float32, Int64, UInt32

from models.errors import EventError

ID_BYTES_MAX = 128
# 1973-03 and 2100-01: anything outside is a unit mistake (seconds, microseconds), not a behaviour.
EVENT_TIME_MS_MIN = 100_000_000_000
EVENT_TIME_MS_MAX = 4_102_444_800_000
WEIGHT_MIN, WEIGHT_MAX = 1e-6, 1e6


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One user behaviour; see the module docstring for the contract of each field."""

    event_id: str
    user_id: str
    item_id: str
    action: str
    event_time_ms: int
    weight: float = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EventColumns:
    """Checked events of one partition in log order, by column. event_hash is crc32 of the event id."""

    event_ids: list[str]
    user_ids: list[str]
    item_ids: list[str]
    actions: list[str]
    offset_N: Int64[np.ndarray, "N"]
    time_ms_N: Int64[np.ndarray, "N"]
    weight_N: Float32[np.ndarray, "N"]
    event_hash_N: UInt32[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.user_ids)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A record that is no event: its offset, the reason code, a sentence for people, the original bytes."""

    offset: int
    reason: str
    detail: str
    value: bytes


_DECODER = msgspec.json.Decoder(Event)


def parse(value: bytes) -> Event:
    """Decode and check one event. Raises EventError with a reason code that a dashboard can group by.

    >>> parse(b'{"event_id": "e", "user_id": "u", "item_id": "i", "action": "view", "event_time_ms": 1600000000}')
    Traceback (most recent call last):
    models.errors.EventError: event_time: event_time_ms 1600000000 is not Unix ms of 1973..2100 (seconds?)
    """
    try:
        event = _DECODER.decode(value)
    except msgspec.ValidationError as error:
        raise EventError("schema", str(error)) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise EventError("json", str(error)) from error
    return check(event)


def check(event: Event) -> Event:
    """Refuse values outside the contract. Raises EventError."""
    for name in ("event_id", "user_id", "item_id", "action"):
        try:
            size = len(getattr(event, name).encode())
        except UnicodeEncodeError as error:
            raise EventError("json", f"{name} is not Unicode text: {error.reason}") from error
        if not 1 <= size <= ID_BYTES_MAX:
            raise EventError("length", f"{name} has {size} bytes, not 1..{ID_BYTES_MAX}")
    if not EVENT_TIME_MS_MIN <= event.event_time_ms < EVENT_TIME_MS_MAX:
        hint = " (seconds?)" if EVENT_TIME_MS_MIN <= event.event_time_ms * 1000 < EVENT_TIME_MS_MAX else ""
        raise EventError("event_time", f"event_time_ms {event.event_time_ms} is not Unix ms of 1973..2100{hint}")
    if not WEIGHT_MIN <= abs(event.weight) <= WEIGHT_MAX:
        raise EventError("weight", f"the size of weight {event.weight} is not within {WEIGHT_MIN:g}..{WEIGHT_MAX:g}")
    return event


def parse_batch(values: Sequence[bytes], offset_N: Int64[np.ndarray, "N"]) -> tuple[EventColumns, list[Reject]]:
    """Decode a batch of one partition; what is no event comes back as a Reject, in order."""
    events: list[Event] = []
    offsets: list[int] = []
    rejects: list[Reject] = []
    for value, offset in zip(values, offset_N.tolist(), strict=True):
        try:
            events.append(parse(value))
            offsets.append(offset)
        except EventError as error:
            rejects.append(Reject(offset=offset, reason=error.reason, detail=error.detail, value=value))
    return columns(events, offsets), rejects


def columns(events: Sequence[Event], offsets: Sequence[int]) -> EventColumns:
    """Events as columns; the order is kept."""
    return EventColumns(
        event_ids=[e.event_id for e in events],
        user_ids=[e.user_id for e in events],
        item_ids=[e.item_id for e in events],
        actions=[e.action for e in events],
        offset_N=np.array(offsets, np.int64),
        time_ms_N=np.array([e.event_time_ms for e in events], np.int64),
        weight_N=np.array([e.weight for e in events], np.float32),
        event_hash_N=np.array([hash_event_id(e.event_id) for e in events], np.uint32),
    )


def runs(code_N: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each run of equal codes: the users, say, of events sorted by user.

    >>> runs(np.array([3, 3, 1, 1, 1]))
    [(0, 2), (2, 5)]
    """
    starts = np.flatnonzero(np.diff(code_N, prepend=-1))
    return list(zip(starts.tolist(), [*starts[1:].tolist(), len(code_N)], strict=False))


def hash_event_id(event_id: str) -> int:
    """A stable 32-bit hash; rows keep 24 bits of it beside the event's other fields to recognise producer repeats."""
    return crc32(event_id.encode())
