"""Who was forgotten, without saying who: keyed hashes of user ids, and the log position up to which each is forgotten.

One rule: what a user did at or below the position of the tombstone never counts again, whatever copy of it turns up;
what comes after it is a new beginning. A file has no positions, so of a file the time of the request decides.

Knows nothing of tables. Shapes: N records.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Bool

from models.user_hash import hashed_user, user_hash_key

# What stands in a letter in place of its bytes and of what was said of them.
ERASED = "erased: its user was forgotten"
# The reason of a record that an ingest left out.
FORGOTTEN_USER = "forgotten"


class Request(NamedTuple):
    """Everything of a user at or below this position is forgotten; requested_ms: when that was asked for (clock)."""

    epoch: int
    partition: int
    offset: int
    requested_ms: int

    def covers(self, epoch: int, partition: int, offset: int) -> bool:
        """Positions of a later epoch are after every request of an earlier one."""
        return epoch < self.epoch or (epoch == self.epoch and partition == self.partition and offset <= self.offset)


@dataclass(frozen=True, kw_only=True, slots=True)
class Forgotten:
    """Everybody's requests by the user's hash. Picklable: the key is named by its file, and read where it is used."""

    key_file: Path | None = None
    requests: Mapping[bytes, tuple[Request, ...]] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.requests)

    def hash(self, user_id: str) -> bytes:
        """Raises InputError as `user_hash_key`."""
        return hashed_user(user_id, user_hash_key(self.key_file))

    def of(self, user_id: str) -> tuple[Request, ...]:
        """The requests of this user, the newest last."""
        return self.requests.get(self.hash(user_id), ()) if self.requests else ()

    def offset(self, user_id: str, epoch: int, partition: int) -> int:
        """The last offset of this partition that is forgotten of the user; -1: none."""
        here = [r.offset for r in self.of(user_id) if (r.epoch, r.partition) == (epoch, partition)]
        return max(here, default=-1)

    def covers(self, key: bytes | None, value: bytes | None, position: tuple[int, int, int]) -> bool:
        """Whether a record, which may be no event, names a user who is forgotten at its position."""
        return bool(self) and any(r.covers(*position) for user_id in users_of(key, value) for r in self.of(user_id))

    def covered_N(
        self, user_ids: Sequence[str | None], epoch: int, partition_N: np.ndarray, offset_N: np.ndarray
    ) -> Bool[np.ndarray, "N"]:
        """Which records are forgotten; one without a user is none."""
        covered_N = np.zeros(len(user_ids), bool)
        known = self._known(user_ids)
        for n, user_id in enumerate(user_ids) if known else ():
            place = (epoch, int(partition_N[n]), int(offset_N[n]))
            covered_N[n] = any(request.covers(*place) for request in known.get(user_id, ()))
        return covered_N

    def before_N(self, user_ids: Sequence[str | None], time_ms_N: np.ndarray) -> Bool[np.ndarray, "N"]:
        """Which records of files are forgotten: those of times up to the request; a time of 0 is not known, and is."""
        known = self._known(user_ids)
        latest = {user_id: max(r.requested_ms for r in requests) for user_id, requests in known.items()}
        return np.array([time_ms <= latest.get(u, -1) for u, time_ms in zip(user_ids, time_ms_N, strict=True)], bool)

    def _known(self, user_ids: Iterable[str | None]) -> dict[str | None, tuple[Request, ...]]:
        if not self.requests:
            return {}
        found = {user_id: self.of(user_id) for user_id in set(user_ids) if user_id is not None}
        return {user_id: requests for user_id, requests in found.items() if requests}


NOBODY_FORGOTTEN = Forgotten()


def users_of(key: bytes | None, value: bytes | None) -> list[str]:
    """The users that a record names which may be no event: its key, and what its value calls user_id."""
    named = [None if key is None else key.decode(errors="surrogateescape"), _named_in(value)]
    return [user_id for user_id in dict.fromkeys(named) if user_id]


def mentions(user_id: str, key: bytes | None, value: bytes | None) -> bool:
    """Whether a record is of this user. One that names no user at all is, if the id stands in it as a word."""
    if key == user_id.encode():
        return True
    if value is None or not any(spelled in value for spelled in spellings(user_id)):
        return False
    named = _named_in(value)
    return stands_in(user_id, value) if named is None else named == user_id


def stands_in(user_id: str, data: bytes) -> bool:
    """Whether the id is in there, in any spelling, and not as a part of a longer word.

    >>> stands_in("u1", b'{"user": "u1"}'), stands_in("u1", b'{"user": "u12"}')
    (True, False)
    """
    return any(re.search(word(spelled), data) is not None for spelled in spellings(user_id))


@lru_cache(maxsize=16)
def spellings(user_id: str) -> tuple[bytes, ...]:
    """The id's bytes, and those that JSON may write in their place."""
    texts = (user_id, json.dumps(user_id)[1:-1], json.dumps(user_id, ensure_ascii=False)[1:-1])
    return tuple(dict.fromkeys(text.encode() for text in texts))


def word(spelled: bytes) -> bytes:
    """The pattern of these bytes where they are not a part of a longer word."""
    return rb"(?<![\w-])" + re.escape(spelled) + rb"(?![\w-])"


class _Named(msgspec.Struct):
    user_id: str


_NAMED = msgspec.json.Decoder(_Named)


def _named_in(value: bytes | None) -> str | None:
    try:
        return None if value is None else _NAMED.decode(value).user_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
