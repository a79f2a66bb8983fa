"""Where the parts of many rows lie in memory, checked: what a reader of a whole batch needs in place of decoding.

The same checks as `models.row.decode_row` and `models.wire.decode_folded` make of one row, in one compiled call and
without copying: sections are given by the addresses of their payloads. One thing more is checked here, because a
ranker reads without the fence: that the two parts belong together. Knows bytes and no algebra.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from inspect import unwrap
from typing import overload

import numba
import numpy as np

from models.cache import CacheSpec
from models.checksums import crc32c_extend
from models.count_kernels import NO_CELL
from models.memory import addresses, load_f32, load_i64, load_u16, load_u32, load_u64
from models.row import RowBytes
from models.wire import (
    CELL_MASSES,
    CELL_NETS,
    CELLS,
    CODES,
    CRC_BYTES,
    EVENTS,
    F32,
    FOLDED_MAGIC,
    HEADER_BYTES,
    I32,
    MASSES,
    MEANS,
    NETS,
    RECENT,
    RECENT_HEAD,
    RECENT_MAGIC,
    RECORD,
    SECTION_BYTES,
    SOUND_CRC,
    U16,
    VERSION,
    offset_in,
)

SOUND, DAMAGED, FOREIGN, ABSENT = 0, 1, 2, 3
# In place of a section's address.
_MISSING, _MALFORMED = -1, -2

_AT = {name: offset_in(RECENT_HEAD, name) for name in RECENT_HEAD.names or ()}
_VERSION_AT, _SECTIONS_AT, _IDENTITY_AT = _AT["version"], _AT["sections"], _AT["checkpoint"]
_EPOCH_AT, _OFFSET_AT, _REVISION_AT = _AT["epoch"], _AT["offset"], _AT["revision"]
_REFERENCE_AT, _COUNT_AT = _AT["reference_ms"], _AT["event_count"]
_DTYPE_AT, _ITEMS_AT, _SIZE_AT = (_AT[name] - HEADER_BYTES for name in ("dtype", "items", "size_bytes"))
_FOLDED_WORD, _RECENT_WORD = (int.from_bytes(magic, "little") for magic in (FOLDED_MAGIC, RECENT_MAGIC))
_TIME_AT, _ITEM_AT, _WEIGHT_AT = (offset_in(RECENT, name) for name in ("time", "item", "weight"))
RECORD_BYTES = RECENT.itemsize


class StoredRows(Sequence[RowBytes | None]):
    """Rows as they lie in memory; one that is asked for is copied.

    address_P, size_P: where folded and recent of each begin, in turns, and how long they are; -1 for one that is not
    there. memory: what holds them; it stays as it is.
    """

    def __init__(self, memory: Sequence[object], address_P: np.ndarray, size_P: np.ndarray) -> None:
        self.memory, self.address_P, self.size_P = memory, address_P, size_P

    @classmethod
    def of(cls, rows: Sequence[RowBytes | None]) -> StoredRows:
        """These rows; those that lie in memory already are left there."""
        if isinstance(rows, StoredRows):
            return rows
        parts = [part for row in rows for part in ((b"", b"") if row is None else (row.folded, row.recent))]
        sizes = [size for row in rows for size in ((-1, -1) if row is None else (len(row.folded), len(row.recent)))]
        return cls(parts, addresses(parts), np.array(sizes, np.int64))

    def __len__(self) -> int:
        return len(self.size_P) // 2

    @overload
    def __getitem__(self, b: int) -> RowBytes | None: ...
    @overload
    def __getitem__(self, b: slice) -> list[RowBytes | None]: ...
    def __getitem__(self, b: int | slice) -> RowBytes | list[RowBytes | None] | None:
        at = range(len(self))[b]
        if isinstance(at, range):
            return [self[n] for n in at]
        # Half a row is no row of ours; its reader will say so.
        if self.size_P[2 * at] < 0:
            return None
        return RowBytes(folded=self.part(2 * at) or b"", recent=self.part(2 * at + 1) or b"")

    def part(self, p: int) -> bytes | None:
        """A copy of one part, None where it is not there."""
        size_bytes = int(self.size_P[p])
        return None if size_bytes < 0 else ctypes.string_at(int(self.address_P[p]), size_bytes)


def sizes_and_limits(
    spec: CacheSpec, actions: int, count_spec: CacheSpec | None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What `place_row` compares a row with: the checkpoint's identity, bytes of an entry's numbers, highest numbers."""
    identity_2 = np.frombuffer(bytes.fromhex(spec.checkpoint_id), np.uint64)
    entry = spec.heads // spec.groups * spec.rates * 4
    rates, cells = (0, 0) if count_spec is None else (count_spec.rates, count_spec.codewords)
    size_3 = np.array([entry, entry * spec.value_width, 4 * rates])
    limit_3 = np.array([spec.groups * spec.codewords, actions, cells])
    return identity_2, size_3, limit_3


def _header(address, size, magic, identity):
    """The status of one part by its header."""
    if size < HEADER_BYTES + CRC_BYTES or crc32c_extend(np.uint32(0), address, size) != SOUND_CRC:
        return DAMAGED
    if load_u32(address) != magic or load_u16(address + _VERSION_AT) != VERSION:
        return DAMAGED
    if load_u64(address + _IDENTITY_AT) != identity[0] or load_u64(address + _IDENTITY_AT + 8) != identity[1]:
        return FOREIGN
    return SOUND


def _section(address, size, kind, dtype, item_bytes):
    """Address and number of items of the section of this kind; below 0 for an address that cannot be used."""
    at, end, found, items = address + HEADER_BYTES, address + size - CRC_BYTES, _MISSING, np.int64(0)
    for _ in range(load_u16(address + _SECTIONS_AT)):
        if at + SECTION_BYTES > end:
            return _MALFORMED, np.int64(0)
        payload, size_bytes = at + SECTION_BYTES, load_i64(at + _SIZE_AT)
        if size_bytes < 0 or size_bytes > end - payload:
            return _MALFORMED, np.int64(0)
        if load_u16(at) == kind:
            found, items = payload, np.int64(load_u32(at + _ITEMS_AT))
            if load_u16(at + _DTYPE_AT) != dtype or items * item_bytes != size_bytes:
                found, items = _MALFORMED, np.int64(0)
        at = payload + size_bytes
    return found, items


def _rising(codes, entries, last, limit):
    """Whether the codes rise, between `last` and `limit`."""
    for n in range(entries):
        code = np.int64(load_u16(codes + 2 * n))
        if code <= last or code >= limit:
            return False
        last = code
    return True


def _counts(folded, folded_size, place, mass_bytes, cells):
    """Find the counts in a folded part; whether they are sound. A part without them has counted nothing."""
    place.cells, place.cell_entries = _section(folded, folded_size, CELLS, U16, 2)
    place.cell_nets, nets = _section(folded, folded_size, CELL_NETS, I32, 4)
    place.cell_masses, masses = _section(folded, folded_size, CELL_MASSES, F32, mass_bytes)
    if max(place.cells, place.cell_nets, place.cell_masses) == _MISSING:
        return min(place.cells, place.cell_nets, place.cell_masses) == _MISSING
    if min(place.cells, place.cell_nets, place.cell_masses) < 0:
        return False
    if nets != place.cell_entries or masses != place.cell_entries:
        return False
    return _rising(place.cells, place.cell_entries, NO_CELL, cells)


def _unpack(folded, records, place, actions, event_N):
    """Take the recent events out; whether they follow what is folded, up to the row's stamp, with known actions."""
    folded_epoch, folded_offset = np.int64(load_u32(folded + _EPOCH_AT)), load_i64(folded + _OFFSET_AT)
    if folded_epoch > place.epoch or (folded_epoch == place.epoch and folded_offset > place.offset):
        return False
    last = folded_offset if folded_epoch == place.epoch else -1
    for n in range(place.events):
        record, event = records + n * RECORD_BYTES, event_N[place.first + n]
        offset, time = np.int64(load_u64(record) >> np.uint64(16)), load_u64(record + _TIME_AT)
        event.time_ms, event.action = np.int64(time >> np.uint64(16)), np.int64(time >> np.uint64(8)) & 0xFF
        event.item, event.weight = np.int64(load_u32(record + _ITEM_AT)), load_f32(record + _WEIGHT_AT)
        if offset <= last or offset > place.offset or event.action >= actions:
            return False
        last = offset
    return True


_header, _section, _rising, _unpack = (
    numba.njit(cache=True)(unwrap(each)) for each in (_header, _section, _rising, _unpack)
)
_counts = numba.njit(cache=True)(unwrap(_counts))


def _place_row(b, first, address_P, size_P, identity_2, size_3, limit_3, place_B, event_N):
    """Find and check the parts of row b, its recent events to come from `first` on, where there is room for them."""
    place = place_B[b]
    folded, recent = address_P[2 * b], address_P[2 * b + 1]
    folded_size, recent_size = size_P[2 * b], size_P[2 * b + 1]
    place.events = 0
    if folded_size < 0:
        place.status = ABSENT
        return
    place.status = _header(folded, folded_size, _FOLDED_WORD, identity_2)
    if place.status == SOUND:
        place.status = _header(recent, recent_size, _RECENT_WORD, identity_2)
    if place.status != SOUND:
        return
    place.codes, place.entries = _section(folded, folded_size, CODES, U16, 2)
    place.nets, nets = _section(folded, folded_size, NETS, I32, 4)
    place.masses, masses = _section(folded, folded_size, MASSES, F32, size_3[0])
    place.means, means = _section(folded, folded_size, MEANS, F32, size_3[1])
    records, place.events = _section(recent, recent_size, EVENTS, RECORD, RECORD_BYTES)
    place.first = first
    place.reference_ms, place.count = load_i64(folded + _REFERENCE_AT), load_i64(folded + _COUNT_AT)
    place.epoch, place.offset = np.int64(load_u32(recent + _EPOCH_AT)), load_i64(recent + _OFFSET_AT)
    place.revision = np.int64(load_u32(recent + _REVISION_AT))
    found = min(place.codes, place.nets, place.masses, place.means, records) >= 0
    if (
        not found
        or nets != place.entries
        or masses != place.entries
        or means != place.entries
        or not _rising(place.codes, place.entries, -1, limit_3[0])
        or not _unpack(folded, records, place, limit_3[1], event_N)
        or (size_3[2] > 0 and not _counts(folded, folded_size, place, size_3[2], limit_3[2]))
    ):
        place.status = DAMAGED


place_row = numba.njit(cache=True, nogil=True)(unwrap(_place_row))
