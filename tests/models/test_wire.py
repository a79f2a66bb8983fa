"""The bytes of a row: round trips, damage, unknown parts, and the golden files that freeze version 1.

The golden files were made once, by `.venv/bin/python -m tests.models.test_wire`. They are never made again: a change of
the format is a new version with files of its own beside these.
"""

from __future__ import annotations

import struct
from dataclasses import replace
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from models.cache import Cache, CacheSpec, decay, delta, empty
from models.counts import CountedEvents, CountPlan
from models.counts import delta as count_delta
from models.errors import ForeignRowError, WireError
from models.event import EVENT_TIME_MS_MAX, EVENT_TIME_MS_MIN
from models.wire import (
    FOLDED_MAGIC,
    RECENT,
    RECENT_MAGIC,
    Stamp,
    decode_counts,
    decode_folded,
    decode_recent,
    encode_folded,
    encode_recent,
    pack_recent,
    read_header,
    recent_actions,
    recent_offsets,
    recent_times,
)
from tests.models.test_cache import START_MS, cases, make_events, make_spec
from tests.models.test_counts import cases as count_cases

GOLDEN = Path(__file__).parent.parent / "golden"
OURS, THEIRS = "ab" * 16, "cd" * 16
STAMP = Stamp(epoch=3, partition=7, offset=1_000_000_007, revision=2)
# Where version 1 keeps what these tests damage; the header is 64 bytes.
VERSION_AT, SECTIONS_AT, HEADER_SIZE = 4, 6, 64

bytes_laws = settings(max_examples=50, deadline=None)
stamps = st.builds(
    Stamp,
    epoch=st.integers(0, 2**32 - 1),
    partition=st.integers(0, 2**32 - 1),
    offset=st.integers(-1, 2**63 - 1),
    revision=st.integers(0, 2**32 - 1),
)


def small_spec() -> CacheSpec:
    return make_spec(groups=2, heads_per_group=2, rates=1, checkpoint_id=OURS)


def small_cache() -> Cache:
    """Values and weights that float32 holds exactly and one event time: no rounding, the same bytes anywhere."""
    return delta(small_spec(), make_events(small_spec(), [(0, 1.5, 0, 1.0), (2, -2.0, 0, 0.5), (2, 4.0, 0, 1.5)]))


def small_recent() -> np.ndarray:
    return pack_recent(
        offset_N=np.array([0, 41, 2**47], np.int64),
        time_ms_N=np.array([EVENT_TIME_MS_MIN, START_MS, EVENT_TIME_MS_MAX - 1], np.int64),
        action_N=np.array([0, 7, 255], np.int64),
        item_N=np.array([0, 5, 2**32 - 1], np.int64),
        weight_N=np.array([1.0, -2.5, 1e6], np.float32),
        event_hash_N=np.array([0, 0xABCDEF, 0xFFFFFFFF], np.uint32),
    )


COUNTS = CountPlan(fields=["item_id", "category"], half_life_ms=[3_600_000.0, None])


def small_counts() -> Cache:
    """Counts of three events at the time of small_cache, which float32 holds exactly."""
    return count_delta(
        COUNTS.spec(OURS),
        CountedEvents(
            cell_NQ=np.array([[7, 65_535], [0, 7], [500, 9]], np.uint16),
            time_ms_N=np.full(3, START_MS),
            weight_N=np.array([1.0, 0.5, 1.5], np.float32),
        ),
    )


def golden_bytes() -> dict[str, bytes]:
    """Today's encoding of what the golden files hold."""
    nothing = Stamp(epoch=0, partition=0, offset=-1)
    return {
        "folded_v1.bin": encode_folded(small_cache(), STAMP),
        "folded_counts_v1.bin": encode_folded(small_cache(), STAMP, small_counts()),
        "folded_empty_v1.bin": encode_folded(empty(small_spec()), nothing),
        "recent_v1.bin": encode_recent(OURS, STAMP, small_recent()),
        "recent_empty_v1.bin": encode_recent(OURS, nothing, np.empty(0, RECENT)),
    }


def signed(body: bytes | bytearray) -> bytes:
    """A body with the checksum it should have: damage that only the checks behind the checksum can see."""
    return bytes(body) + struct.pack("<I", google_crc32c.value(bytes(body)))


def assert_same_bits(found: Cache, wanted: Cache) -> None:
    assert (found.reference_ms, found.count) == (wanted.reference_ms, wanted.count)
    for name in ("code_N", "net_N", "mass_NPR", "mean_NPRD"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name), strict=True)


@bytes_laws
@given(cases(), stamps)
def test_a_folded_part_comes_back_as_it_was(case, stamp):
    spec, events = case
    cache = delta(spec, events)
    found, found_stamp = decode_folded(encode_folded(cache, stamp), spec)
    assert_same_bits(found, cache)
    assert found_stamp == stamp


@bytes_laws
@given(st.integers(0, 20), st.data())
def test_a_recent_part_comes_back_field_by_field(n, data):
    columns = {
        "offset_N": data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 2**48 - 1))),
        "time_ms_N": data.draw(hnp.arrays(np.int64, n, elements=st.integers(EVENT_TIME_MS_MIN, EVENT_TIME_MS_MAX - 1))),
        "action_N": data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 255))),
        "item_N": data.draw(hnp.arrays(np.int64, n, elements=st.integers(0, 2**32 - 1))),
        "weight_N": data.draw(hnp.arrays(np.float32, n, elements=st.floats(-1e6, 1e6, width=32))),
        "event_hash_N": data.draw(hnp.arrays(np.uint32, n, elements=st.integers(0, 2**32 - 1))),
    }
    stamp = data.draw(stamps)
    found, found_stamp = decode_recent(encode_recent(OURS, stamp, pack_recent(**columns)), OURS)
    assert found_stamp == stamp
    np.testing.assert_array_equal(recent_offsets(found), columns["offset_N"], strict=True)
    np.testing.assert_array_equal(recent_times(found), columns["time_ms_N"], strict=True)
    np.testing.assert_array_equal(recent_actions(found), columns["action_N"], strict=True)
    np.testing.assert_array_equal(found["item"], columns["item_N"])
    np.testing.assert_array_equal(found["weight"], columns["weight_N"])
    hash_N = (found["position"] & np.uint64(0xFFFF)) << np.uint64(8) | found["time"] & np.uint64(0xFF)
    np.testing.assert_array_equal(hash_N, columns["event_hash_N"] & 0xFFFFFF)


def test_a_header_says_what_the_part_holds():
    folded, recent = golden_bytes()["folded_v1.bin"], golden_bytes()["recent_v1.bin"]
    header = read_header(folded, FOLDED_MAGIC)
    assert (header.checkpoint_id, header.stamp) == (OURS, STAMP)
    assert (header.reference_ms, header.event_count) == (START_MS, 3)
    header = read_header(recent, RECENT_MAGIC, OURS)
    assert (header.reference_ms, header.event_count) == (EVENT_TIME_MS_MAX - 1, 3)


def decoders(name: str):
    if "counts" in name:
        return lambda data: decode_counts(data, COUNTS.spec(OURS))
    return (lambda data: decode_folded(data, small_spec())) if "folded" in name else (lambda d: decode_recent(d, OURS))


@pytest.mark.parametrize("name", sorted(golden_bytes()))
def test_every_flipped_bit_is_refused(name):
    data = golden_bytes()[name]
    decode = decoders(name)
    for bit in range(len(data) * 8):
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError):
            decode(bytes(damaged))


@pytest.mark.parametrize("name", sorted(golden_bytes()))
def test_every_truncation_and_extension_is_refused(name):
    data = golden_bytes()[name]
    decode = decoders(name)
    for size in range(len(data)):
        with pytest.raises(WireError):
            decode(data[:size])
    for tail in (b"\0", b"\0" * 4, b"x" * 24, data):
        with pytest.raises(WireError):
            decode(data + tail)
        with pytest.raises(WireError):
            decode(tail + data)


def test_random_flips_in_a_bigger_part_are_refused():
    rng = np.random.default_rng(0)
    recent = pack_recent(
        offset_N=np.arange(1000),
        time_ms_N=START_MS + np.arange(1000),
        action_N=rng.integers(0, 256, 1000),
        item_N=rng.integers(0, 2**32, 1000),
        weight_N=np.ones(1000, np.float32),
        event_hash_N=rng.integers(0, 2**32, 1000),
    )
    data = encode_recent(OURS, STAMP, recent)
    for bit in rng.integers(0, len(data) * 8, 500).tolist():
        damaged = bytearray(data)
        damaged[bit // 8] ^= 1 << bit % 8
        with pytest.raises(WireError, match="checksum"):
            decode_recent(bytes(damaged), OURS)


@pytest.mark.parametrize("name", ["folded_v1.bin", "recent_v1.bin"])
def test_an_unknown_version_is_refused(name):
    body = bytearray(golden_bytes()[name][:-4])
    struct.pack_into("<H", body, VERSION_AT, 2)
    with pytest.raises(WireError, match="version 2; this program knows 1"):
        decoders(name)(signed(body))


@pytest.mark.parametrize("name", ["folded_v1.bin", "recent_v1.bin"])
def test_the_other_part_of_a_row_is_refused(name):
    other = "recent_v1.bin" if "folded" in name else "folded_v1.bin"
    with pytest.raises(WireError, match="magic"):
        decoders(name)(golden_bytes()[other])


@pytest.mark.parametrize("name", ["folded_v1.bin", "recent_v1.bin", "folded_empty_v1.bin"])
@pytest.mark.parametrize("first", [True, False])
def test_a_section_of_an_unknown_type_is_skipped(name, first):
    data = golden_bytes()[name]
    body = bytearray(data[:-4])
    (sections,) = struct.unpack_from("<H", body, SECTIONS_AT)
    struct.pack_into("<H", body, SECTIONS_AT, sections + 1)
    extra = struct.pack("<HHIQ", 77, 99, 5, 13) + b"a later part!"
    at = HEADER_SIZE if first else len(body)
    found, found_stamp = decoders(name)(signed(body[:at] + extra + body[at:]))
    wanted, stamp = decoders(name)(data)
    assert found_stamp == stamp
    if isinstance(wanted, Cache):
        assert_same_bits(found, wanted)
    else:
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize(
    ("name", "sections"), [("recent_v1.bin", 0), *(("folded_v1.bin", n) for n in (0, 2, 5, 2**16 - 1))]
)
def test_a_wrong_number_of_sections_is_refused(name, sections):
    body = bytearray(golden_bytes()[name][:-4])
    struct.pack_into("<H", body, SECTIONS_AT, sections)
    with pytest.raises(WireError):
        decoders(name)(signed(body))


@pytest.mark.parametrize(("at", "size"), [(HEADER_SIZE + 4, 4), (HEADER_SIZE + 8, 8)])
@pytest.mark.parametrize("name", ["folded_v1.bin", "recent_v1.bin"])
@pytest.mark.parametrize("change", [1, -1, 2**20])
def test_a_section_whose_sizes_disagree_is_refused(name, at, size, change):
    body = bytearray(golden_bytes()[name][:-4])
    kind = "<I" if size == 4 else "<Q"
    (right,) = struct.unpack_from(kind, body, at)
    struct.pack_into(kind, body, at, right + change)
    with pytest.raises(WireError):
        decoders(name)(signed(body))


@bytes_laws
@given(cases(), count_cases(), stamps)
def test_counts_come_back_as_they_were_beside_the_cache(case, counted, stamp):
    spec, events = case
    plan, counted_events = counted
    counts = replace(count_delta(plan.spec(spec.checkpoint_id), counted_events), count=len(events))
    cache = decay(delta(spec, events), max(counts.reference_ms, delta(spec, events).reference_ms))
    counts = decay(counts, cache.reference_ms)
    data = encode_folded(cache, stamp, counts)
    assert_same_bits(decode_counts(data, counts.spec), counts)
    found, found_stamp = decode_folded(data, spec)
    assert_same_bits(found, cache)
    assert found_stamp == stamp


def test_a_part_without_sections_of_counts_has_counted_nothing():
    counts = decode_counts(golden_bytes()["folded_v1.bin"], COUNTS.spec(OURS))
    assert (counts.reference_ms, counts.count, len(counts.code_N)) == (START_MS, 3, 0)
    assert encode_folded(small_cache(), STAMP, counts) == golden_bytes()["folded_v1.bin"]


def test_counts_that_are_incomplete_or_do_not_rise_from_cell_one_are_refused():
    body = golden_bytes()["folded_counts_v1.bin"][:-4]
    at = len(golden_bytes()["folded_v1.bin"]) - 4
    counts = small_counts()
    for wrong in (counts.code_N[::-1], np.full_like(counts.code_N, 7), counts.code_N - np.uint16(7)):
        data = encode_folded(small_cache(), STAMP, replace(counts, code_N=wrong))
        with pytest.raises(WireError, match=r"rising|cell 0"):
            decode_counts(data, counts.spec)
        assert_same_bits(decode_folded(data, small_spec())[0], small_cache())
    for section in range(3):
        start = at
        for _ in range(section):
            start += 16 + struct.unpack_from("<Q", body, start + 8)[0]
        for kind, where in (("<H", 0), ("<H", 2), ("<I", 4)):
            damaged = bytearray(body)
            struct.pack_into(kind, damaged, start + where, 99)
            with pytest.raises(WireError):
                decode_counts(signed(damaged), counts.spec)


def test_codes_that_do_not_rise_or_are_too_large_are_refused():
    spec = small_spec()
    cache = small_cache()
    for codes in (cache.code_N[::-1], np.full_like(cache.code_N, 1), cache.code_N + np.uint16(4)):
        wrong = Cache(**{name: getattr(cache, name) for name in Cache.__slots__} | {"code_N": codes})
        with pytest.raises(WireError, match="rising below 6"):
            decode_folded(encode_folded(wrong, STAMP), spec)


def test_a_row_of_another_checkpoint_is_foreign_not_damaged():
    with pytest.raises(ForeignRowError, match=f"{OURS}, not {THEIRS}"):
        decode_recent(golden_bytes()["recent_v1.bin"], THEIRS)
    with pytest.raises(ForeignRowError):
        decode_folded(golden_bytes()["folded_v1.bin"], make_spec(groups=2, heads_per_group=2, checkpoint_id=THEIRS))


@pytest.mark.parametrize("name", sorted(golden_bytes()))
def test_the_encoder_still_gives_the_golden_bytes(name):
    assert golden_bytes()[name] == (GOLDEN / name).read_bytes()


def test_the_decoder_still_reads_the_golden_folded_part():
    cache, stamp = decode_folded((GOLDEN / "folded_v1.bin").read_bytes(), small_spec())
    assert stamp == Stamp(epoch=3, partition=7, offset=1_000_000_007, revision=2)
    assert (cache.reference_ms, cache.count) == (1_600_000_000_000, 3)
    assert cache.code_N.tolist() == [0, 2, 3, 5]
    assert cache.net_N.tolist() == small_cache().net_N.tolist() == [1, 2, 1, 2]
    assert cache.mass_NPR.reshape(4, 2).tolist() == [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0], [2.0, 2.0]]
    assert cache.mean_NPRD.reshape(4, 4).tolist() == [[1.5] * 4, [2.5] * 4, [1.5] * 4, [2.5] * 4]


def test_the_decoder_still_reads_the_golden_counts():
    data = (GOLDEN / "folded_counts_v1.bin").read_bytes()
    counts = decode_counts(data, COUNTS.spec("ab" * 16))
    assert (counts.reference_ms, counts.count) == (1_600_000_000_000, 3)
    assert counts.code_N.tolist() == [7, 9, 500, 65_535]
    assert counts.net_N.tolist() == [2, 1, 1, 1]
    assert counts.mass_NPR.reshape(4, 2).tolist() == [[1.5, 1.5], [1.5, 1.5], [1.5, 1.5], [1.0, 1.0]]
    assert_same_bits(decode_folded(data, small_spec())[0], small_cache())


def test_the_decoder_still_reads_the_golden_recent_part():
    recent, stamp = decode_recent((GOLDEN / "recent_v1.bin").read_bytes(), "ab" * 16)
    assert stamp == Stamp(epoch=3, partition=7, offset=1_000_000_007, revision=2)
    assert recent_offsets(recent).tolist() == [0, 41, 140_737_488_355_328]
    assert recent_times(recent).tolist() == [100_000_000_000, 1_600_000_000_000, 4_102_444_799_999]
    assert recent_actions(recent).tolist() == [0, 7, 255]
    assert recent["item"].tolist() == [0, 5, 4_294_967_295]
    assert recent["weight"].tolist() == [1.0, -2.5, 1_000_000.0]
    assert not recent.flags.writeable


def test_the_decoder_still_reads_the_golden_empty_row():
    cache, folded_stamp = decode_folded((GOLDEN / "folded_empty_v1.bin").read_bytes(), small_spec())
    recent, stamp = decode_recent((GOLDEN / "recent_empty_v1.bin").read_bytes(), OURS)
    assert folded_stamp == stamp == Stamp(epoch=0, partition=0, offset=-1)
    assert_same_bits(cache, empty(small_spec()))
    assert (len(recent), recent.dtype) == (0, RECENT)


def test_golden_files_are_small_and_none_is_left_unread():
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(golden_bytes())
    assert all(path.stat().st_size < 4096 for path in GOLDEN.iterdir())


def test_a_stamp_covers_what_is_at_or_below_it_and_orders_by_epoch_offset_revision():
    assert STAMP.covers(3, 1_000_000_007)
    assert STAMP.covers(2, 10**12)
    assert not STAMP.covers(3, 1_000_000_008)
    assert not STAMP.covers(4, 0)
    positions = [(1, 1, 0), (1, 0, 1), (0, 9, 9), (1, 0, 0)]
    stamps = [Stamp(epoch=epoch, partition=0, offset=offset, revision=r) for epoch, offset, r in positions]
    assert [s.order for s in sorted(stamps, key=lambda s: s.order)] == [(0, 9, 9), (1, 0, 0), (1, 0, 1), (1, 1, 0)]


def write_golden_files() -> None:
    """Write the golden files that are not there yet; one that is there is never written again."""
    for name, data in golden_bytes().items():
        if not (GOLDEN / name).exists():
            (GOLDEN / name).write_bytes(data)


if __name__ == "__main__":
    write_golden_files()
