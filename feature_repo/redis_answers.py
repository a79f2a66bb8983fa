"""Rows as a Redis server sends them, received into memory of our own and left where they lie.

A client's own parser copies each byte string twice, and takes as long as the server itself.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Sequence

import numba
import numpy as np
from numba import types
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


# libc's, which compiled code calls without the interpreter.
_recv = types.ExternalFunction("recv", types.int64(types.int32, types.int64, types.int64, types.int32))
_poll = types.ExternalFunction("poll", types.int32(types.int64, types.int64, types.int32))
_clock_gettime = types.ExternalFunction("clock_gettime", types.int32(types.int32, types.int64))
_AT_ONCE, _TO_READ, _CLOCK = np.int32(socket.MSG_DONTWAIT), select.POLLIN, np.int32(time.CLOCK_MONOTONIC)


@numba.njit("Tuple((i8, i8, i8, b1))(u1[::1], i8, i8, i8, i8[::1], i8[::1], i8)", cache=True, nogil=True)
def _find(block, address, begin, end, address_P, size_P, found):
    """Where the strings of the pairs from `begin` to `end` are: *2, and twice $, a size and so many bytes.

    Returns where the first pair begins that is not all there, how many strings are found by now, how many bytes
    that pair takes at least, and whether it can become one.
    """
    while found < len(size_P):
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
            address_P[found + p], size_P[found + p] = address + at, -1 if none else size
            if at <= end and not none:
                at += size + 2
                need = at - begin
                if at <= end and (block[at - 2] != _CR or block[at - 1] != _LF):
                    return begin, found, need, False
            if at > end:
                return begin, found, need, True
        begin, found = at, found + 2
    return begin, found, 0, begin == end


@numba.njit("f8()", cache=True, nogil=True)
def _now_s():
    time_2 = np.zeros(2, np.int64)
    _clock_gettime(_CLOCK, time_2.ctypes.data)
    return time_2[0] + 1e-9 * time_2[1]


@numba.njit("i8(i8, i8, i8, f8)", cache=True, nogil=True)
def _receive_some(descriptor, address, size_bytes, until_s):
    """How many bytes came by then; below 1 where none did, whatever the cause."""
    came = _recv(np.int32(descriptor), address, size_bytes, _AT_ONCE)
    if came < 0:
        # Whole milliseconds that are left; what is less than one is the caller's to wait.
        left_ms = min(max(int(1000 * (until_s - _now_s())), 0), 1 << 30)
        # struct pollfd: the descriptor, and what is waited for in the next two bytes.
        polled_2 = np.array([descriptor, _TO_READ], np.int32)
        if _poll(polled_2.ctypes.data, 1, np.int32(left_ms)) > 0:
            came = _recv(np.int32(descriptor), address, size_bytes, _AT_ONCE)
    return came


@numba.njit(
    "Tuple((i8, i8, i8, i8, b1))(i8, f8, i8, i8, u1[::1], i8, i8, i8, i8, i8[::1], i8[::1], i8)",
    cache=True,
    nogil=True,
)
def _receive(descriptor, wait_s, wanted, at_once, block, address, begin, end, need, address_P, size_P, found):
    """Receive and find, until so many strings are found, the block is full, or no more comes in time."""
    until_s, sound = _now_s() + wait_s, True
    while found < wanted and sound and len(block) - end >= max(need - (end - begin), at_once // 4):
        came = _receive_some(descriptor, address + end, min(at_once, len(block) - end), until_s)
        if came <= 0:
            break
        end += came
        begin, found, need, sound = _find(block, address, begin, end, address_P, size_P, found)
    return begin, end, found, need, sound


class PairAnswers:
    """The answers to so many commands that each ask for two strings (HMGET, MGET), as they come: `room` says where to.

    Raises the error that is answered in place of a pair, as redis-py names it, and InvalidResponse for anything else:
    what follows on the connection then cannot be used.
    """

    def __init__(self, commands: int) -> None:
        self._address_P, self._size_P = np.empty((2, 2 * commands), np.int64)
        self._blocks: list[np.ndarray] = []
        self._found = self._need_bytes = 0
        self._begin_block(BLOCK_BYTES)

    def __len__(self) -> int:
        """How many are there."""
        return self._found // 2

    def rows(self, first: int, last: int) -> StoredRows:
        """Those from `first` to `last`, without the last: strings f and r."""
        at = slice(2 * first, 2 * last)
        return StoredRows(self._blocks, self._address_P[at], self._size_P[at])

    def pair(self, n: int) -> list[bytes | None]:
        """Both strings, None where there is none."""
        rows = self.rows(n, n + 1)
        return [rows.part(0), rows.part(1)]

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
        self._begin, self._found, self._need_bytes, sound = _find(
            self._block, self._address, self._begin, self._end, self._address_P, self._size_P, self._found
        )
        if not sound:
            self._refuse()

    def receive(self, descriptor: int, wanted: int, wait_s: float) -> bool:
        """Receive from a plain socket until so many are there, for at most so long; False where nothing came.

        One compiled call in place of many turns of `room` and `received`, with the interpreter free. Why nothing came,
        the socket will say.
        """
        self.room()
        before = self._end
        self._begin, self._end, self._found, self._need_bytes, sound = _receive(
            descriptor,
            wait_s,
            2 * wanted,
            RECEIVE_BYTES,
            self._block,
            self._address,
            self._begin,
            self._end,
            self._need_bytes,
            self._address_P,
            self._size_P,
            self._found,
        )
        if not sound:
            self._refuse()
        return self._end > before

    def _begin_block(self, size_bytes: int) -> None:
        self._block = np.empty(size_bytes, np.uint8)
        self._blocks.append(self._block)
        self._view, self._address = memoryview(self._block), self._block.__array_interface__["data"][0]
        self._begin = self._end = 0

    def _refuse(self) -> None:
        """What is no pair: an error is waited for to its end."""
        line = self._block[self._begin : min(self._end, self._begin + LINE_BYTES)].tobytes()
        if not line.startswith(b"-"):
            raise InvalidResponse(f"the server's answer is not of the protocol: {line[:32]!r}")
        if _LINE_END in line or len(line) == LINE_BYTES:
            raise DefaultParser.parse_error(line[1:].partition(_LINE_END)[0].decode(errors="replace"))
