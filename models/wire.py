"""The bytes of a row: the one file that knows offsets, widths and checksums.

A user's row is two byte strings written together: `folded` (the per-codeword entries) and `recent` (the newest
raw events, not yet folded). Both are a header, typed sections and a checksum, all little-endian:

    0   magic          4s   "VQLF" folded, "VQLR" recent
    4   version        u16  1
    6   sections       u16
    8   checkpoint     16s  first 16 bytes of the checkpoint id
    24  epoch          u32  the log's epoch          \\
    28  partition      u32                            | the stamp: complete up to this position
    32  offset         i64  -1: nothing yet           |
    40  revision       u32  raised by repairs        /
    44  reserved       u32  0
    48  reference_ms   i64  folded: T of the cache; recent: newest event time
    56  event_count    i64  events in this part
    64  sections, each: type u16, dtype u16, items u32, size_bytes u64, payload
    end CRC32C of all before, u32

Section types: 1 codes (u16 each), 2 net counts (i32 each), 3 masses (f32, items x P x R), 4 means (f32, items x P x
R x D), 5 recent events (24 bytes each, `RECENT`), and of the counts (`models.counts`), in a folded part that has any:
6 cells (u16 each), 7 their net counts (i32 each), 8 their masses (f32, items x R of the counts). A reader skips types
it does not know, so a later part is a new section and not a new version. Version 1 is frozen by the golden files in
tests/golden.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator, Sequence
from dataclasses import replace

import google_crc32c
import msgspec
import numpy as np

from models.cache import Cache, CacheSpec, empty
from models.errors import ForeignRowError, WireError

VERSION = 1
_HEADER = struct.Struct("<4sHH16sIIqIIqq")
_SECTION = struct.Struct("<HHIQ")
_CRC = struct.Struct("<I")
FOLDED_MAGIC, RECENT_MAGIC = b"VQLF", b"VQLR"
CODES, NETS, MASSES, MEANS, EVENTS = 1, 2, 3, 4, 5
CELLS, CELL_NETS, CELL_MASSES = 6, 7, 8
U16, I32, F32, RECORD = 1, 2, 3, 5
_DTYPES = {U16: np.dtype("<u2"), I32: np.dtype("<i4"), F32: np.dtype("<f4")}

# position = offset << 16 | high 16 bits of the event hash; time = event_time_ms << 16 | action << 8 | hash byte.
# 48 bits of offset and of time are enough for 280 trillion; 24 bits of hash are compared beside all other fields.
OFFSET_MAX = (1 << 48) - 1
RECENT = np.dtype([("position", "<u8"), ("time", "<u8"), ("item", "<u4"), ("weight", "<f4")])
# The recent part up to its records: the header and the head of its one section, as columns of many rows.
RECENT_HEAD = np.dtype(
    [
        ("magic", "S4"),
        ("version", "<u2"),
        ("sections", "<u2"),
        ("checkpoint", "V16"),
        ("epoch", "<u4"),
        ("partition", "<u4"),
        ("offset", "<i8"),
        ("revision", "<u4"),
        ("reserved", "<u4"),
        ("reference_ms", "<i8"),
        ("event_count", "<i8"),
        ("kind", "<u2"),
        ("dtype", "<u2"),
        ("items", "<u4"),
        ("size_bytes", "<u8"),
    ]
)
assert RECENT_HEAD.itemsize == _HEADER.size + _SECTION.size
HEADER_BYTES, SECTION_BYTES, CRC_BYTES = _HEADER.size, _SECTION.size, _CRC.size
# What a checksum comes to over bytes that end with their own: so no copy without its last four has to be made.
SOUND_CRC = google_crc32c.value(_CRC.pack(google_crc32c.value(b"")))


def offset_in(record: np.dtype, field: str) -> int:
    """Where a field of RECENT or RECENT_HEAD begins, in bytes."""
    offsets = {name: place[1] for name, place in (record.fields or {}).items()}
    return offsets[field]


class Stamp(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The log position up to which a row is complete. Rows are ordered by (epoch, offset, revision)."""

    epoch: int
    partition: int
    offset: int
    revision: int = 0

    @property
    def order(self) -> tuple[int, int, int]:
        return (self.epoch, self.offset, self.revision)

    def covers(self, epoch: int, offset: int) -> bool:
        """Whether an event at this position is already in the row."""
        return (epoch, offset) <= (self.epoch, self.offset)


class Header(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What both parts of a row say about themselves."""

    checkpoint_id: str
    stamp: Stamp
    reference_ms: int
    event_count: int


def encode_folded(cache: Cache, stamp: Stamp, counts: Cache | None = None) -> bytes:
    """The per-codeword entries of a cache, and the counts of the same events, complete up to the stamp."""
    header = Header(
        checkpoint_id=cache.spec.checkpoint_id,
        stamp=stamp,
        reference_ms=cache.reference_ms,
        event_count=cache.count,
    )
    sections = [
        *_entries(cache, (CODES, NETS, MASSES)),
        (MEANS, F32, len(cache.code_N), cache.mean_NPRD.astype("<f4", copy=False).tobytes()),
    ]
    if counts is not None and len(counts.code_N):
        assert counts.reference_ms == cache.reference_ms, "counts and cache are of the same events"
        sections += _entries(counts, (CELLS, CELL_NETS, CELL_MASSES))
    return _encode(FOLDED_MAGIC, header, sections)


def _entries(cache: Cache, kinds: tuple[int, int, int]) -> list[tuple[int, int, int, bytes]]:
    """Codes, net counts and masses as sections of these types."""
    columns = ((U16, "<u2", cache.code_N), (I32, "<i4", cache.net_N), (F32, "<f4", cache.mass_NPR))
    return [
        (kind, dtype, len(array), array.astype(text, copy=False).tobytes())
        for kind, (dtype, text, array) in zip(kinds, columns, strict=True)
    ]


def decode_folded(data: bytes, spec: CacheSpec) -> tuple[Cache, Stamp]:
    """Raises WireError for damage or an unknown version, ForeignRowError for a row of another checkpoint."""
    header = read_header(data, FOLDED_MAGIC, spec.checkpoint_id)
    arrays = {kind: (dtype, items, payload) for kind, dtype, items, payload in _sections(data)}
    mean_NPRD = _array(arrays, MEANS, (spec.heads // spec.groups, spec.rates, spec.value_width))
    return _cache(arrays, (CODES, NETS, MASSES), header, spec, mean_NPRD), header.stamp


def decode_counts(data: bytes, spec: CacheSpec) -> Cache:
    """The counts of a folded part, none where it has no sections of them; spec is `CountPlan.spec`.

    Raises WireError and ForeignRowError as `decode_folded`.
    """
    header = read_header(data, FOLDED_MAGIC, spec.checkpoint_id)
    arrays = {kind: (dtype, items, payload) for kind, dtype, items, payload in _sections(data)}
    kinds = (CELLS, CELL_NETS, CELL_MASSES)
    if not any(kind in arrays for kind in kinds):
        return replace(empty(spec), reference_ms=header.reference_ms, count=header.event_count)
    items = arrays[CELLS][1] if CELLS in arrays else 0
    counts = _cache(arrays, kinds, header, spec, np.empty((items, 1, spec.rates, 0), np.float32))
    if len(counts.code_N) and counts.code_N[0] == 0:
        raise WireError("cell 0 holds nothing, but is there")
    return counts


def _cache(
    arrays: dict[int, tuple[int, int, memoryview]],
    kinds: tuple[int, int, int],
    header: Header,
    spec: CacheSpec,
    mean_NPRD: np.ndarray,
) -> Cache:
    """The cache whose codes, net counts and masses are the sections of these types. Raises WireError."""
    codes, nets, masses = kinds
    code_N = _array(arrays, codes, ())
    net_N = _array(arrays, nets, ())
    mass_NPR = _array(arrays, masses, (spec.heads // spec.groups, spec.rates))
    lengths = [len(array) for array in (code_N, net_N, mass_NPR, mean_NPRD)]
    if len(set(lengths)) != 1:
        raise WireError(f"sections disagree: {lengths} codes, net counts, masses, means")
    if len(code_N) and (int(code_N[-1]) >= spec.groups * spec.codewords or (np.diff(code_N.astype(int)) <= 0).any()):
        raise WireError(f"codes are not rising below {spec.groups * spec.codewords}")
    return Cache(
        spec=spec,
        reference_ms=header.reference_ms,
        count=header.event_count,
        code_N=code_N.astype(np.uint16, copy=False),
        net_N=net_N.astype(np.int32, copy=False),
        mass_NPR=mass_NPR.astype(np.float32, copy=False),
        mean_NPRD=mean_NPRD.astype(np.float32, copy=False),
    )


def encode_recents(checkpoint_id: str, stamps: Sequence[Stamp], recents: Sequence[bytes]) -> list[bytes]:
    """The newest raw events of many rows (records of dtype RECENT, rising offsets), each complete up to its stamp."""
    size_U = np.fromiter(map(len, recents), np.int64, len(recents))
    head_U = np.zeros(len(recents), RECENT_HEAD)
    head_U["magic"], head_U["version"], head_U["sections"] = RECENT_MAGIC, VERSION, 1
    head_U["checkpoint"] = np.void(bytes.fromhex(checkpoint_id))
    head_U["epoch"] = [stamp.epoch for stamp in stamps]
    head_U["partition"] = [stamp.partition for stamp in stamps]
    head_U["offset"] = [stamp.offset for stamp in stamps]
    head_U["revision"] = [stamp.revision for stamp in stamps]
    head_U["event_count"] = head_U["items"] = size_U // RECENT.itemsize
    head_U["kind"], head_U["dtype"], head_U["size_bytes"] = EVENTS, RECORD, size_U
    held_U = size_U > 0
    if held_U.any():
        time_N = np.frombuffer(b"".join(recents), RECENT)["time"]
        start_U = np.cumsum(size_U)[held_U] // RECENT.itemsize - head_U["items"][held_U]
        head_U["reference_ms"][held_U] = np.maximum.reduceat(time_N, start_U) >> np.uint64(16)
    heads, width = head_U.tobytes(), RECENT_HEAD.itemsize
    out = []
    for at, records in zip(range(0, len(heads), width), recents, strict=True):
        body = heads[at : at + width] + records
        out.append(body + _CRC.pack(google_crc32c.value(body)))
    return out


def encode_recent(checkpoint_id: str, stamp: Stamp, recent: np.ndarray) -> bytes:
    """`encode_recents` of one row, from an array of dtype RECENT."""
    (data,) = encode_recents(checkpoint_id, [stamp], [recent.tobytes()])
    return data


def decode_recent(data: bytes, checkpoint_id: str) -> tuple[np.ndarray, Stamp]:
    """The events (dtype RECENT, read-only view) and the row's stamp. Raises WireError, ForeignRowError."""
    header = read_header(data, RECENT_MAGIC, checkpoint_id)
    for kind, dtype, items, payload in _sections(data):
        if kind == EVENTS:
            if dtype != RECORD or len(payload) != items * RECENT.itemsize:
                raise WireError(f"{items} recent events do not fit in {len(payload)} bytes")
            return np.frombuffer(payload, RECENT), header.stamp
    raise WireError("no section of recent events")


def read_header(data: bytes, magic: bytes, checkpoint_id: str | None = None) -> Header:
    """Check the checksum, magic, version and (when given) the checkpoint; return the header."""
    if len(data) < _HEADER.size + _CRC.size:
        raise WireError(f"{len(data)} bytes are too few for a row")
    if google_crc32c.value(data) != SOUND_CRC:
        raise WireError(f"checksum does not match over {len(data)} bytes")
    found, version, _, identity, epoch, partition, offset, revision, _, reference_ms, count = _HEADER.unpack_from(data)
    if found != magic:
        raise WireError(f"magic {found!r} is not {magic!r}")
    if version != VERSION:
        raise WireError(f"row format version {version}; this program knows {VERSION}")
    if checkpoint_id is not None and identity.hex() != checkpoint_id:
        raise ForeignRowError(f"the row belongs to checkpoint {identity.hex()}, not {checkpoint_id}")
    stamp = Stamp(epoch=epoch, partition=partition, offset=offset, revision=revision)
    return Header(checkpoint_id=identity.hex(), stamp=stamp, reference_ms=reference_ms, event_count=count)


def pack_recent(
    offset_N: np.ndarray,
    time_ms_N: np.ndarray,
    action_N: np.ndarray,
    item_N: np.ndarray,
    weight_N: np.ndarray,
    event_hash_N: np.ndarray,
) -> np.ndarray:
    """Columns to RECENT records."""
    recent = np.empty(len(offset_N), RECENT)
    hash_N = event_hash_N.astype(np.uint64) & np.uint64(0xFFFFFF)
    recent["position"] = offset_N.astype(np.uint64) << np.uint64(16) | hash_N >> np.uint64(8)
    low_N = action_N.astype(np.uint64) << np.uint64(8) | hash_N & np.uint64(0xFF)
    recent["time"] = time_ms_N.astype(np.uint64) << np.uint64(16) | low_N
    recent["item"] = item_N
    recent["weight"] = weight_N
    return recent


def recent_offsets(recent: np.ndarray) -> np.ndarray:
    return (recent["position"] >> np.uint64(16)).astype(np.int64)


def recent_times(recent: np.ndarray) -> np.ndarray:
    return (recent["time"] >> np.uint64(16)).astype(np.int64)


def recent_actions(recent: np.ndarray) -> np.ndarray:
    return (recent["time"] >> np.uint64(8) & np.uint64(0xFF)).astype(np.int64)


def _encode(magic: bytes, header: Header, sections: Sequence[tuple[int, int, int, bytes]]) -> bytes:
    stamp = header.stamp
    parts = [
        _HEADER.pack(
            magic,
            VERSION,
            len(sections),
            bytes.fromhex(header.checkpoint_id),
            stamp.epoch,
            stamp.partition,
            stamp.offset,
            stamp.revision,
            0,
            header.reference_ms,
            header.event_count,
        )
    ]
    for kind, dtype, items, payload in sections:
        parts += [_SECTION.pack(kind, dtype, items, len(payload)), payload]
    body = b"".join(parts)
    return body + _CRC.pack(google_crc32c.value(body))


def _sections(data: bytes) -> Iterator[tuple[int, int, int, memoryview]]:
    """The sections of bytes whose header and checksum were already checked."""
    (count,) = struct.unpack_from("<H", data, 6)
    view, at, end = memoryview(data), _HEADER.size, len(data) - _CRC.size
    for _ in range(count):
        if at + _SECTION.size > end:
            raise WireError(f"section table runs past the end at byte {at}")
        kind, dtype, items, size_bytes = _SECTION.unpack_from(data, at)
        at += _SECTION.size
        if at + size_bytes > end:
            raise WireError(f"section {kind} of {size_bytes} bytes runs past the end")
        yield kind, dtype, items, view[at : at + size_bytes]
        at += size_bytes


def _array(arrays: dict[int, tuple[int, int, memoryview]], kind: int, shape: tuple[int, ...]) -> np.ndarray:
    if kind not in arrays or arrays[kind][0] not in _DTYPES:
        raise WireError(f"section {kind} is missing or of an unknown dtype")
    code, items, payload = arrays[kind]
    dtype = _DTYPES[code]
    if len(payload) != items * dtype.itemsize * math.prod(shape):
        raise WireError(f"section {kind}: {items} items of shape {shape} do not fit in {len(payload)} bytes")
    return np.frombuffer(payload, dtype).reshape(items, *shape)
