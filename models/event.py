"""One behaviour as it travels on the log, and how raw records become checked columns.

An event is a JSON object (UTF-8) in a record keyed by user_id:

    {"event_id": "b1-7", "user_id": "u1", "item_id": "p9", "action": "purchase",
     "event_time_ms": 1483271606000, "weight": 1.0}

`weight` defaults to 1; a negative weight retracts an earlier event: same item, action, event_time_ms and
size of weight. A record with a key and no value is a tombstone: what came before it of that user is erased. Among
the checked columns it is the one whose weight is 0.

Most records are good, so a batch is decoded by one compiled decoder that knows the limits, and screened by column;
only what either of them refuses is looked at again, to say why. Knows the contract of an event and nothing of where
it came from.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import compress
from typing import Annotated, NamedTuple
from zlib import crc32

import msgspec
import numpy as np
from jaxtyping import Bool, Float32, Int64, UInt32

from models.errors import EventError

ID_BYTES_MAX = 128
RECORD_BYTES_MAX = 65_536
# 1973-03 and 2100-01: anything outside is a unit mistake (seconds, microseconds), not a behaviour.
EVENT_TIME_MS_MIN = 100_000_000_000
EVENT_TIME_MS_MAX = 4_102_444_800_000
WEIGHT_MIN, WEIGHT_MAX = 1e-6, 1e6
# An event from further ahead of its record's own time is refused: reading as of it would decay a history to nothing.
FUTURE_MS_MAX = 600_000
UNKNOWN_TIME = -1
REASONS = ("json", "schema", "length", "event_time", "weight", "size", "key", "future")


@dataclass(frozen=True, kw_only=True, slots=True)
class Records:
    """Consecutive records of one partition, as they lie on the log: rising offsets, keys and the original bytes.

    log_time_ms_N is each record's own timestamp (Unix ms), UNKNOWN_TIME where the log keeps none; a key is None where
    the log keeps none, a value where the record is a tombstone.
    """

    epoch: int
    partition: int
    offset_N: Int64[np.ndarray, "N"]
    log_time_ms_N: Int64[np.ndarray, "N"]
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]

    def __len__(self) -> int:
        return len(self.values)


class Event(msgspec.Struct, frozen=True, kw_only=True):
    """One user behaviour; see the module docstring for the contract of each field."""

    event_id: str
    user_id: str
    item_id: str
    action: str
    event_time_ms: int
    weight: float = 1.0


_Id = Annotated[str, msgspec.Meta(min_length=1, max_length=ID_BYTES_MAX)]


class _Limited(Event, frozen=True, kw_only=True):
    """An Event whose limits the decoder checks: those of ids as letters, which is enough for ASCII."""

    event_id: _Id
    user_id: _Id
    item_id: _Id
    action: _Id
    event_time_ms: Annotated[int, msgspec.Meta(ge=EVENT_TIME_MS_MIN, lt=EVENT_TIME_MS_MAX)]
    weight: Annotated[float, msgspec.Meta(ge=-WEIGHT_MAX, le=WEIGHT_MAX)] = 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class EventColumns:
    """Checked events of one partition in log order, by column. event_hash is crc32 of the event id.

    A tombstone is among them with its user, weight 0, and nothing else.
    """

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

    def where(self, kept_N: Bool[np.ndarray, "N"]) -> EventColumns:
        """The events that are kept, in their order."""
        return EventColumns(
            event_ids=list(compress(self.event_ids, kept_N)),
            user_ids=list(compress(self.user_ids, kept_N)),
            item_ids=list(compress(self.item_ids, kept_N)),
            actions=list(compress(self.actions, kept_N)),
            offset_N=self.offset_N[kept_N],
            time_ms_N=self.time_ms_N[kept_N],
            weight_N=self.weight_N[kept_N],
            event_hash_N=self.event_hash_N[kept_N],
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Reject:
    """A record that is no event: its offset, a reason of REASONS, a sentence for people, the original bytes."""

    offset: int
    log_time_ms: int
    reason: str
    detail: str
    key: bytes | None
    value: bytes | None


class _Refusal(NamedTuple):
    """What an EventError said. Kept in its place: an error holds its frames, and they hold it and the whole batch."""

    reason: str
    detail: str


_DECODER = msgspec.json.Decoder(Event)
_LIMITED_DECODER = msgspec.json.Decoder(_Limited)


def parse(value: bytes) -> Event:
    """Decode and check one event. Raises EventError with a reason code that a dashboard can group by.

    >>> parse(b'{"event_id": "e", "user_id": "u", "item_id": "i", "action": "view", "event_time_ms": 1600000000}')
    Traceback (most recent call last):
    models.errors.EventError: event_time: event_time_ms 1600000000 is not Unix ms of 1973..2100 (seconds?)
    """
    if len(value) > RECORD_BYTES_MAX:
        raise EventError("size", f"the record has {len(value)} bytes, over {RECORD_BYTES_MAX}")
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


def tombstone(key: bytes | None) -> Event:
    """What stands among events for a record without a value. Raises EventError when its key names no user."""
    try:
        user_id = (key or b"").decode()
    except UnicodeDecodeError as error:
        raise EventError("key", f"a tombstone's key names no user: {error}") from error
    if not 1 <= len(key or b"") <= ID_BYTES_MAX:
        raise EventError("key", f"a tombstone's key has {len(key or b'')} bytes, not 1..{ID_BYTES_MAX}")
    return Event(event_id="", user_id=user_id, item_id="", action="", event_time_ms=0, weight=0.0)


def parse_batch(records: Records, future_ms_max: int = FUTURE_MS_MAX) -> tuple[EventColumns, list[Reject]]:
    """Decode a batch; what is no event comes back as a Reject, in order.

    future_ms_max: how far an event's time may lie after its record's own time.
    """
    events, places, refused, odd = _decode(records)
    found = columns(events, records.offset_N[places])
    for n in sorted({*odd, *_beyond_limits(found, records.log_time_ms_N[places], future_ms_max)}):
        try:
            _judge(events[n], places[n], records, future_ms_max)
        except EventError as error:
            refused[places[n]] = _Refusal(error.reason, error.detail)
    if len(events) + len(refused) > len(records):
        found = found.where(np.array([place not in refused for place in places], bool))
    return found, [_reject(place, refused[place], records) for place in sorted(refused)]


def _decode(records: Records) -> tuple[list[Event], list[int], dict[int, _Refusal], list[int]]:
    """The events among the records, the place of each, by place why the others are none, and which events are odd.

    An odd one has to be looked at again: it is large, its key is not its user, or some id may not be ASCII.
    """
    decode = _LIMITED_DECODER.decode
    events: list[Event] = []
    places: list[int] = []
    refused: dict[int, _Refusal] = {}
    odd: list[int] = []
    for place, (value, key) in enumerate(zip(records.values, records.keys, strict=True)):
        try:
            if value is None:
                event = tombstone(key)
            else:
                try:
                    event = decode(value)
                except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                    # Letters are not bytes: what the limits refuse may still be an event, and if not, this says why.
                    event = parse(value)
                if (
                    not value.isascii()
                    or b"\\" in value
                    or len(value) > RECORD_BYTES_MAX
                    or (key is not None and key != event.user_id.encode(errors="replace"))
                ):
                    odd.append(len(events))
        except EventError as error:
            refused[place] = _Refusal(error.reason, error.detail)
        else:
            events.append(event)
            places.append(place)
    return events, places, refused, odd


def _beyond_limits(found: EventColumns, log_time_ms_N: np.ndarray, future_ms_max: int) -> list[int]:
    """Which of the decoded events may have a weight or a time beyond the limits; tombstones are among them."""
    size_N = np.abs(found.weight_N)
    future_N = (log_time_ms_N != UNKNOWN_TIME) & (found.time_ms_N > log_time_ms_N + future_ms_max)
    return np.flatnonzero((size_N <= WEIGHT_MIN) | (size_N >= WEIGHT_MAX) | future_N).tolist()


def _judge(event: Event, place: int, records: Records, future_ms_max: int) -> None:
    """Raises EventError when an event breaks the contract by itself, or for the record that it came in."""
    key, value, log_time_ms = records.keys[place], records.values[place], int(records.log_time_ms_N[place])
    if value is None:
        return
    if len(value) > RECORD_BYTES_MAX:
        raise EventError("size", f"the record has {len(value)} bytes, over {RECORD_BYTES_MAX}")
    check(event)
    if key is not None and key != event.user_id.encode():
        raise EventError("key", f"the record's key {key[:ID_BYTES_MAX]!r} is not its user_id {event.user_id!r}")
    if log_time_ms != UNKNOWN_TIME and event.event_time_ms > log_time_ms + future_ms_max:
        ahead_s = (event.event_time_ms - log_time_ms) / 1000
        raise EventError(
            "future", f"event_time_ms {event.event_time_ms} is {ahead_s:,.0f} s after the record's own time"
        )


def _reject(place: int, refusal: _Refusal, records: Records) -> Reject:
    return Reject(
        offset=int(records.offset_N[place]),
        log_time_ms=int(records.log_time_ms_N[place]),
        reason=refusal.reason,
        detail=refusal.detail,
        key=records.keys[place],
        value=records.values[place],
    )


def columns(events: Sequence[Event], offsets: Sequence[int] | np.ndarray) -> EventColumns:
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
