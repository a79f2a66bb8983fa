"""Rows as a Redis server sends them, received into memory of our own and left where they lie.

A client's own parser copies each byte string twice, and takes as long as the server itself.
"""

from __future__ import annotations

from collections.abc import Sequence

import numba
import numpy as np
from redis.connection import DefaultParser
from redis.exceptions import InvalidResponse

from models.row_places import StoredRows

BLOCK_BYTES = 1 << 20
# Of what is received at once, so that it is still in the core's cache when it is looked at.
RECEIVE_BYTES = 1 << 18
# A string of the protocol is no longer than this (proto-max-bulk-len, as servers come).
STRING_BYTES_MAX = 512 << 20
# Of an error more is not looked at.
LINE_BYTES = 1 << 12
_LINE_END = b"\r\n"
_STAR, _TWO, _DOLLAR, _MINUS, _ZERO, _NINE, _CR, _LF = (np.uint8(ord(each)) for each in "*2$-09\r\n")


def packed(command: Sequence[bytes]) -> bytes:
    """A command as it is sent.

    >>> packed((b"GET", b"key"))
    b'*2\\r\\n$3\\r\\nGET\\r\\n$3\\r\\nkey\\r\\n'
    """
    return b"*%d\r\n%b" % (len(command), b"".join([b"$%d\r\n%b\r\n" % (len(each), each) for each in command]))


@numba.njit("Tuple((i8, i8, i8, b1))(u1[::1], i8, i8, i8[::1], i8[::1], i8)", cache=True)
def _find(block, begin, end, start_P, size_P, found):
    """Where the strings of the pairs from `begin` to `end` are: *2, and twice $, a size and so many bytes.

    Returns where the first pair begins that is not all there, how many strings are found by now, how many bytes
    that pair takes at least, and whether it can become one.
    """
    while found < len(start_P):
        at, need = begin, 4
        for place, byte in enumerate((_STAR, _TWO, _CR, _LF)):
            if at + place < end and block[at + place] != byte:
                return begin, found, need, False
        at += 4
        for p in range(2):
            need = at - begin + 4
            if at < end and block[at] != _DOLLAR:
                return begin, found, need, False
            at += 1
            none, size, digits = at < end and block[at] == _MINUS, 0, 0
            at += none
            while at < end and _ZERO <= block[at] <= _NINE and digits < 10:
                size, digits, at = 10 * size + np.int64(block[at] - _ZERO), digits + 1, at + 1
            if at < end and (block[at] != _CR or digits == 0 or (none and size != 1) or size > STRING_BYTES_MAX):
                return begin, found, need, False
            if at + 1 < end and block[at + 1] != _LF:
                return begin, found, need, False
            at += 2
            start_P[found + p], size_P[found + p] = at, -1 if none else size
            if at <= end and not none:
                at += size + 2
                need = at - begin
                if at <= end and (block[at - 2] != _CR or block[at - 1] != _LF):
                    return begin, found, need, False
            if at > end:
                return begin, found, need, True
        begin, found = at, found + 2
    return begin, found, 0, begin == end


class PairAnswers:
    """The answers to so many commands that each ask for two strings (HMGET, MGET), as they come: `room` says where to.

    Raises the error that is answered in place of a pair, as redis-py names it, and InvalidResponse for anything else:
    what follows on the connection then cannot be used.
    """

    def __init__(self, commands: int) -> None:
        self._start_P, self._size_P, self._address_P = np.empty((3, 2 * commands), np.int64)
        self._parts: list[np.ndarray] = []
        self._begin_block(BLOCK_BYTES)
        self._need_bytes = 0

    def __len__(self) -> int:
        """How many are there."""
        return len(self._parts) // 2

    def rows(self, first: int, last: int) -> StoredRows:
        """Those from `first` to `last`, without the last: strings f and r."""
        at = slice(2 * first, 2 * last)
        return StoredRows(self._parts[at], self._address_P[at], self._size_P[at])

    def pair(self, n: int) -> list[bytes | None]:
        """Both strings, None where there is none."""
        return [None if self._size_P[p] < 0 else self._parts[p].tobytes() for p in (2 * n, 2 * n + 1)]

    def room(self) -> memoryview:
        """Where to receive to; at least one byte."""
        here = self._end - self._begin
        if len(self._block) - self._end < max(self._need_bytes - here, RECEIVE_BYTES // 4):
            # A string lies in one piece: what has come of it moves on.
            rest = self._block[self._begin : self._end]
            self._begin_block(max(BLOCK_BYTES, 2 * self._need_bytes))
            self._block[:here] = rest
            self._end = here
        return self._view[self._end : self._end + RECEIVE_BYTES]

    def received(self, size_bytes: int) -> None:
        """So much has come."""
        self._end += size_bytes
        block, before = self._block, len(self._parts)
        self._begin, found, self._need_bytes, sound = _find(
            block, self._begin, self._end, self._start_P, self._size_P, before
        )
        start_P, size_P = self._start_P[before:found], self._size_P[before:found]
        self._address_P[before:found] = start_P + self._address
        ends = (start_P + np.maximum(size_P, 0)).tolist()
        self._parts += [block[start:end] for start, end in zip(start_P.tolist(), ends, strict=True)]
        if not sound:
            self._refuse()

    def _begin_block(self, size_bytes: int) -> None:
        self._block = np.empty(size_bytes, np.uint8)
        self._view, self._address = memoryview(self._block), self._block.__array_interface__["data"][0]
        self._begin = self._end = 0

    def _refuse(self) -> None:
        """What is no pair: an error is waited for to its end."""
        line = self._block[self._begin : min(self._end, self._begin + LINE_BYTES)].tobytes()
        if not line.startswith(b"-"):
            raise InvalidResponse(f"the server's answer is not of the protocol: {line[:32]!r}")
        if _LINE_END in line or len(line) == LINE_BYTES:
            raise DefaultParser.parse_error(line[1:].partition(_LINE_END)[0].decode(errors="replace"))
