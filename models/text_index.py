"""Texts to indices, many at a time from Arrow's own bytes: what a dict does, without a Python string for each.

Slots are an open-addressed table, at most half full: the upper half of a slot is that of its text's hash, the lower one
more than the text's place; 0 is free. Equal texts are compared byte by byte, so a hash decides nothing by itself.

Shapes: N texts asked, M texts known, S slots (a power of two).
"""

from __future__ import annotations

from collections.abc import Mapping
from inspect import unwrap

import numba
import numpy as np
import pyarrow as pa
from jaxtyping import Int32, Int64, UInt64

from models.memory import load_u8, load_u64

# The golden ratio, in 64 bits: an odd number whose multiples lie evenly.
_RATIO = np.uint64(0x9E3779B97F4A7C15)
_BYTE, _HALF, _LOWER = np.uint64(8), np.uint64(32), np.uint64(0xFFFFFFFF)


class TextIndex:
    """The index of each text."""

    def __init__(self, index: Mapping[str, int]) -> None:
        self._index_M = np.fromiter(index.values(), np.int64, len(index))
        self._text_M = pa.array(index.keys(), pa.string())
        self._slot_S = np.zeros(2 << len(index).bit_length(), np.uint64)
        _insert(*_places(self._text_M), self._slot_S)

    def find(self, text_N: pa.StringArray, otherwise: int) -> Int64[np.ndarray, "N"]:
        """The texts' indices; `otherwise` for those that are not known, and for nulls."""
        place_N = _find(*_places(text_N), *_places(self._text_M), self._slot_S)
        if text_N.null_count:
            place_N[text_N.is_null().to_numpy(zero_copy_only=False)] = -1
        return np.append(self._index_M, otherwise)[place_N]


def _places(text_N: pa.StringArray) -> tuple[int, Int32[np.ndarray, "N1"]]:
    """The address of the array's bytes; and where each text begins from there, and the last one ends."""
    _, ends, data = text_N.buffers()
    if ends is None or data is None:
        return 0, np.zeros(len(text_N) + 1, np.int32)
    return data.address, np.frombuffer(ends, np.int32, len(text_N) + 1, 4 * text_N.offset)


def _hash_loop(start: int, size: int) -> np.uint64:
    """Of the bytes from this address on."""
    hashed, at, word = np.uint64(size), 0, np.uint64(0)
    while at + 8 <= size:
        hashed = (hashed ^ load_u64(start + at)) * _RATIO
        hashed ^= hashed >> _HALF
        at += 8
    while at < size:
        word = (word << _BYTE) | np.uint64(load_u8(start + at))
        at += 1
    hashed = (hashed ^ word) * _RATIO
    hashed = (hashed ^ (hashed >> _HALF)) * _RATIO
    return hashed ^ (hashed >> _HALF)


_hash = numba.njit(cache=True)(unwrap(_hash_loop))


def _same_loop(one: int, other: int, size: int) -> bool:
    at = 0
    while at + 8 <= size:
        if load_u64(one + at) != load_u64(other + at):
            return False
        at += 8
    while at < size:
        if load_u8(one + at) != load_u8(other + at):
            return False
        at += 1
    return True


_same = numba.njit(cache=True)(unwrap(_same_loop))


def _insert_loop(known: int, start_M: Int32[np.ndarray, "M1"], slot_S: UInt64[np.ndarray, "S"]) -> None:
    """Put texts that differ from one another into free slots."""
    last = np.uint64(len(slot_S) - 1)
    for place in range(len(start_M) - 1):
        hashed = _hash(known + start_M[place], start_M[place + 1] - start_M[place])
        at = hashed & last
        while slot_S[at] != np.uint64(0):
            at = (at + np.uint64(1)) & last
        slot_S[at] = ((hashed >> _HALF) << _HALF) | np.uint64(place + 1)


def _find_loop(
    asked: int,
    start_N: Int32[np.ndarray, "N1"],
    known: int,
    start_M: Int32[np.ndarray, "M1"],
    slot_S: UInt64[np.ndarray, "S"],
) -> Int64[np.ndarray, "N"]:
    """The place of each text among those that are known; -1 where it is none of them."""
    last = np.uint64(len(slot_S) - 1)
    place_N = np.full(len(start_N) - 1, -1, np.int64)
    for n in range(len(place_N)):
        text, size = asked + start_N[n], start_N[n + 1] - start_N[n]
        hashed = _hash(text, size)
        at = hashed & last
        while slot_S[at] != np.uint64(0):
            if slot_S[at] >> _HALF == hashed >> _HALF:
                place = np.int64(slot_S[at] & _LOWER) - 1
                first = start_M[place]
                if start_M[place + 1] - first == size and _same(text, known + first, size):
                    place_N[n] = place
                    break
            at = (at + np.uint64(1)) & last
    return place_N


# unwrap: in tests the functions of this module carry run-time shape checks, which numba cannot compile.
_insert = numba.njit(cache=True)(unwrap(_insert_loop))
_find = numba.njit(cache=True, nogil=True)(unwrap(_find_loop))
