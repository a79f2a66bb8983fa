"""The tensors of a batch are those of decoding and folding each row, bit for bit, whatever is wrong with some rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from models.attention import CacheBatch
from models.checkpoint import Checkpoint
from models.count_kernels import BEYOND
from models.dense_caches import DenseBatch, dense_caches
from models.errors import ForeignRowError, WireError
from models.item_table import UNKNOWN
from models.newest import newest_of
from models.row import Fold, Row, RowBytes, advance, decode_row, encode_row, new_row, whole_cache, whole_counts
from models.row_places import ABSENT, DAMAGED, FOREIGN, SOUND
from models.wire import Stamp, encode_recent, pack_recent
from tests.small import ACTIONS, COUNTS, HOUR_MS, START_MS, small_checkpoint, write_items

CPU = torch.device("cpu")


def random_row(checkpoint: Checkpoint, using: Fold, events: int, seed: int) -> Row:
    """Some retractions, weights, late times, and batches that leave events recent."""
    rng, row, at = np.random.default_rng(seed), new_row(checkpoint.spec, 1, 2), 0
    position = Stamp(epoch=1, partition=2, offset=-1)
    while at < events:
        count = min(events - at, int(rng.integers(1, 9)))
        records = pack_recent(
            np.arange(at, at + count) * 3,
            START_MS + (np.arange(at, at + count) * HOUR_MS // 7) - rng.integers(0, HOUR_MS, count),
            rng.integers(0, len(ACTIONS), count),
            rng.integers(0, len(using.table), count),
            rng.uniform(0.5, 2.0, count).astype(np.float32),
            rng.integers(0, 2**24, count).astype(np.uint32),
        )
        row, _ = advance(row, records, position, using)
        if rng.random() < 0.3 and len(row.recent):
            back = row.recent[-1:].copy()
            back["position"] += 1 << 16
            back["weight"] *= -1
            row, _ = advance(row, back, position, using)
        at += count
    return row


def plain(rows: list[RowBytes | None], using: Fold) -> tuple[CacheBatch, list[int]]:
    """The obvious way: a user at a time."""
    caches, counts, sound, statuses = [], [], [], []
    for data in rows:
        cache, counted, row, status = None, None, None, ABSENT
        if data is not None:
            try:
                row = decode_row(data, using.spec)
                cache, counted, status = whole_cache(row, using), whole_counts(row, using), SOUND
            except ForeignRowError:
                status = FOREIGN
            except WireError:
                status = DAMAGED
        caches.append(cache)
        counts.append(counted)
        sound.append(row)
        statuses.append(status)
    return CacheBatch.of(using.spec, caches, counts, newest_of(sound, using)), statuses


def assert_same(a: CacheBatch, b: CacheBatch) -> None:
    for name in CacheBatch.__slots__:
        assert torch.equal(getattr(a, name), getattr(b, name)), name


def without_padding(caches: CacheBatch) -> CacheBatch:
    """As wide as the user with most counts needs."""
    longest = int((caches.cell_BN != BEYOND).sum(dim=1).max())
    return replace(caches, cell_BN=caches.cell_BN[:, :longest], cell_mass_BNR=caches.cell_mass_BNR[:, :longest])


def places_of(rows: list[RowBytes | None], using: Fold) -> np.ndarray:
    """What is said of each row where the tensors are made of it."""
    batch = DenseBatch(len(rows), using, CPU)
    batch.fill(0, rows)
    return batch.place_B


def assert_as_plain(rows: list[RowBytes | None], using: Fold) -> list[int]:
    place_B = places_of(rows, using)
    expected, statuses = plain(rows, using)
    assert place_B["status"].tolist() == statuses
    assert_same(dense_caches(rows, using, CPU).caches, expected)
    return statuses


@pytest.mark.parametrize("counts", [None, COUNTS])
@pytest.mark.parametrize("rates", [1, 3])
@pytest.mark.parametrize(("window", "newest"), [(0, 0), (4, 0), (4, 3), (64, 64)])
def test_every_row_comes_out_as_decoded_and_folded_by_itself(tmp_path, window, newest, rates, counts) -> None:
    checkpoint = small_checkpoint(tmp_path / "c", window=window, newest=newest, rates=rates, counts=counts)
    using = checkpoint.fold()
    rows = [encode_row(random_row(checkpoint, using, events, events)) for events in (0, 1, 3, 5, 9, 60, 300, 127)]
    assert assert_as_plain([None, *rows, None, rows[-1]], using) == [ABSENT, *[SOUND] * 8, ABSENT, SOUND]


def test_a_batch_of_nobody_is_empty(checkpoint: Checkpoint) -> None:
    using = checkpoint.fold()
    assert_as_plain([], using)
    assert_as_plain([None, None], using)


@pytest.fixture(params=[(None, 0), (COUNTS, 0), (None, 3)], ids=["", "counts", "newest"])
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Checkpoint:
    counts, newest = request.param
    return small_checkpoint(tmp_path / "c", counts=counts, newest=newest)


def flipped(data: bytes, bit: int) -> bytes:
    return data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :]


def test_a_flipped_bit_in_one_of_a_hundred_rows_masks_that_user_and_no_other(checkpoint: Checkpoint) -> None:
    using, rng = checkpoint.fold(), np.random.default_rng(0)
    rows = [encode_row(random_row(checkpoint, using, int(rng.integers(0, 90)), n)) for n in range(100)]
    sound = dense_caches(rows, using, CPU).caches
    for _ in range(200):
        hit = int(rng.integers(len(rows)))
        row = rows[hit]
        if rng.random() < 0.5:
            bad = RowBytes(folded=flipped(row.folded, int(rng.integers(8 * len(row.folded)))), recent=row.recent)
        else:
            bad = RowBytes(folded=row.folded, recent=flipped(row.recent, int(rng.integers(8 * len(row.recent)))))
        hurt = [*rows[:hit], bad, *rows[hit + 1 :]]
        place_B = places_of(hurt, using)
        caches = dense_caches(hurt, using, CPU).caches
        assert place_B["status"][hit] == DAMAGED
        assert not caches.present_B[hit]
        assert not caches.mass_BHKR[hit].any()
        assert not caches.newest_weight_BL[hit].any()
        others = [b for b in range(len(rows)) if b != hit]
        assert_same(without_padding(caches.take(others)), without_padding(sound.take(others)))


def resealed(body: bytes) -> bytes:
    """These bytes with a checksum that is right."""
    import google_crc32c

    return body + google_crc32c.value(body).to_bytes(4, "little")


def test_bytes_that_are_wrong_under_a_right_checksum_are_refused_and_read_no_further(checkpoint: Checkpoint) -> None:
    using, rng = checkpoint.fold(), np.random.default_rng(1)
    row = encode_row(random_row(checkpoint, using, 40, 3))
    bad: list[RowBytes | None] = []
    for _ in range(400):
        part = bytearray(row.folded[:-4] if rng.random() < 0.5 else row.recent[:-4])
        folded = part[:4] == b"VQLF"
        # Section heads are worth more tries than floats.
        at = int(rng.integers(0, min(len(part), 200)))
        part[at] = int(rng.integers(256))
        if rng.random() < 0.3:
            del part[int(rng.integers(64, len(part))) :]
        data = resealed(bytes(part))
        bad.append(RowBytes(folded=data, recent=row.recent) if folded else RowBytes(folded=row.folded, recent=data))
    for data in (b"", b"VQLF", resealed(b""), resealed(row.recent[:64])):
        bad += [RowBytes(folded=data, recent=row.recent), RowBytes(folded=row.folded, recent=data)]
    place_B = places_of([*bad, row], using)
    caches = dense_caches([*bad, row], using, CPU).caches
    _, statuses = plain([row], using)
    assert statuses == [SOUND]
    assert place_B["status"][-1] == SOUND
    assert_same(
        dense_caches([row], using, CPU).caches,
        without_padding(CacheBatch(**{name: getattr(caches, name)[-1:] for name in CacheBatch.__slots__})),
    )
    assert {DAMAGED, FOREIGN} <= set(place_B["status"].tolist())


def test_a_row_of_another_checkpoint_is_foreign(checkpoint: Checkpoint, tmp_path: Path) -> None:
    other = small_checkpoint(tmp_path / "other", seed=1)
    using = checkpoint.fold()
    mine = encode_row(random_row(checkpoint, using, 30, 0))
    theirs = encode_row(random_row(other, other.fold(), 30, 0))
    half = RowBytes(folded=mine.folded, recent=theirs.recent)
    assert assert_as_plain([mine, theirs, half], using) == [SOUND, FOREIGN, FOREIGN]


def test_two_parts_of_different_writes_are_no_row(checkpoint: Checkpoint) -> None:
    using = checkpoint.fold()
    row = random_row(checkpoint, using, 6, 0)
    later = random_row(checkpoint, using, 60, 0)
    torn = RowBytes(folded=encode_row(later).folded, recent=encode_row(row).recent)
    assert assert_as_plain([torn, encode_row(row)], using) == [DAMAGED, SOUND]


def test_an_action_that_the_checkpoint_does_not_know_is_damage(checkpoint: Checkpoint) -> None:
    using = checkpoint.fold()
    row = random_row(checkpoint, using, 6, 0)
    recent = row.recent.copy()
    recent["time"] |= np.uint64(0xFF << 8)
    data = encode_row(row)
    bad = RowBytes(folded=data.folded, recent=encode_recent(checkpoint.checkpoint_id, row.stamp, recent))
    assert places_of([bad], using)["status"].tolist() == [DAMAGED]


def test_items_beyond_the_table_are_read_as_unknown_and_counted(checkpoint: Checkpoint) -> None:
    before = checkpoint.fold()
    write_items(checkpoint, [f"new{n}" for n in range(1, 51)], "items-00001.parquet", seed=5)
    row = random_row(checkpoint, checkpoint.fold(), 7, 0)
    beyond_N = row.recent["item"] >= len(before.table)
    assert beyond_N.any()
    known = row.recent.copy()
    known["item"][beyond_N] = UNKNOWN
    as_unknown = RowBytes(folded=row.folded_data, recent=encode_recent(checkpoint.checkpoint_id, row.stamp, known))
    found = dense_caches([encode_row(row)], before, CPU)
    assert found.unknown_B.tolist() == [int(beyond_N.sum())]
    assert_same(found.caches, plain([as_unknown], before)[0])


def test_the_order_of_the_rows_stamps_is_known(checkpoint: Checkpoint) -> None:
    using = checkpoint.fold()
    row = random_row(checkpoint, using, 6, 0)
    (place,) = places_of([encode_row(row)], using)[["epoch", "offset", "revision"]].tolist()
    assert place == row.stamp.order
