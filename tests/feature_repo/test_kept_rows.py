from __future__ import annotations

import numpy as np
import pytest
import torch

from feature_repo.kept_rows import KeptRows
from models.checkpoint import Checkpoint
from models.dense_caches import DenseBatch
from models.row import Fold, RowBytes, encode_row
from tests.feature_repo.rows import small_rows


class Clock:
    """Seconds that the test turns."""

    now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def rows(checkpoint: Checkpoint, fold: Fold) -> dict[str, RowBytes]:
    return {user_id: encode_row(row) for user_id, row in small_rows(checkpoint, fold, 400).items()}


@pytest.fixture
def older(checkpoint: Checkpoint, fold: Fold) -> dict[str, RowBytes]:
    return {user_id: encode_row(row) for user_id, row in small_rows(checkpoint, fold, 200).items()}


def places(data: list[RowBytes | None], fold: Fold) -> np.ndarray:
    """Each row's place, as a read finds it."""
    batch = DenseBatch(len(data), fold, torch.device("cpu"))
    batch.fill(0, data)
    return batch.place_B


def renew(kept: KeptRows, rows: dict[str, RowBytes | None], fold: Fold) -> list[str]:
    """Who has an older row than before."""
    users, data = list(rows), list(rows.values())
    return [users[b] for b in kept.renew(users, data, places(data, fold))]


def test_rows_are_kept_for_a_while_after_the_store_gave_them_last(rows, fold: Fold) -> None:
    clock = Clock()
    kept = KeptRows(1 << 20, 10.0, clock)
    assert renew(kept, rows, fold) == []
    clock.now_s += 8
    assert kept.get(["u0", "nobody", "u1"]) == [rows["u0"], None, rows["u1"]]
    renew(kept, {"u0": rows["u0"]}, fold)
    clock.now_s += 8
    assert kept.get(["u0", "u1"]) == [rows["u0"], None]


def test_a_store_that_goes_back_is_noticed_until_what_is_kept_is_too_old(rows, older, fold: Fold) -> None:
    clock = Clock()
    kept = KeptRows(1 << 20, 10.0, clock)
    renew(kept, rows, fold)
    assert renew(kept, older, fold) == list(older)
    assert kept.get(["u0"]) == [rows["u0"]]
    clock.now_s += 11
    assert renew(kept, older, fold) == []
    assert kept.get(["u0"]) == [older["u0"]]
    assert renew(kept, rows, fold) == []
    assert kept.get(["u0"]) == [rows["u0"]]


def test_users_whom_the_store_has_not_are_forgotten_and_damage_is_not_kept(rows, fold: Fold) -> None:
    kept = KeptRows(1 << 20, 10.0, Clock())
    renew(kept, rows, fold)
    damaged = RowBytes(folded=rows["u1"].folded[:-1], recent=rows["u1"].recent)
    assert renew(kept, {"u0": None, "u1": damaged}, fold) == []
    assert kept.get(["u0", "u1"]) == [None, rows["u1"]]
    kept.clear()
    assert kept.get(list(rows)) == [None] * len(rows)
    assert kept.size_bytes == 0


@pytest.mark.parametrize("by", ["get", "renew"])
def test_the_least_recently_used_go_first(rows, fold: Fold, by: str) -> None:
    size = max(row.size_bytes for row in rows.values()) + 1000
    kept = KeptRows(2 * size, 10.0, Clock())
    for user_id in ("u0", "u1"):
        renew(kept, {user_id: rows[user_id]}, fold)
    if by == "get":
        kept.get(["u0"])
    else:
        renew(kept, {"u0": rows["u0"]}, fold)
    renew(kept, {"u2": rows["u2"]}, fold)
    assert [row is not None for row in kept.get(["u0", "u1", "u2"])] == [True, False, True]
    assert 0 < kept.size_bytes <= 2 * size
    tiny = KeptRows(10, 10.0, Clock())
    renew(tiny, rows, fold)
    assert tiny.size_bytes == 0


def test_a_row_larger_than_all_that_may_be_kept_pushes_no_other_out(rows, fold: Fold) -> None:
    kept = KeptRows(max(row.size_bytes for row in rows.values()) * len(rows) + 3000, 10.0, Clock())
    renew(kept, {"u0": rows["u0"], "u1": rows["u1"]}, fold)
    before = kept.size_bytes
    large = RowBytes(folded=rows["u2"].folded, recent=bytes(1 << 20))
    kept.renew(["u2"], [large], places([rows["u2"]], fold))
    assert kept.get(["u0", "u1", "u2"]) == [rows["u0"], rows["u1"], None]
    assert kept.size_bytes == before


def test_what_is_replaced_or_forgotten_is_no_longer_counted(rows, older, fold: Fold) -> None:
    kept, new = KeptRows(1 << 20, 10.0, Clock()), KeptRows(1 << 20, 10.0, Clock())
    renew(kept, older, fold)
    renew(kept, rows, fold)
    renew(kept, {"u0": None}, fold)
    renew(new, {user_id: row for user_id, row in rows.items() if user_id != "u0"}, fold)
    assert kept.size_bytes == new.size_bytes > 0


def test_what_was_found_before_may_be_gone_or_anothers_by_the_time_it_is_renewed(rows, older, fold: Fold) -> None:
    clock = Clock()
    kept = KeptRows(1 << 22, 10.0, clock)
    renew(kept, {"u0": rows["u0"]}, fold)
    place_B = places([rows["u0"]], fold)
    found = kept.find(["u0"])
    # The same row of another user takes its slot.
    renew(kept, {"u0": None}, fold)
    renew(kept, {"u1": rows["u0"]}, fold)
    clock.now_s += 8
    assert kept.renew(["u0"], [rows["u0"]], place_B, found) == []
    clock.now_s += 8
    assert kept.get(["u0", "u1"]) == [rows["u0"], None]
    # A user who was not found is kept by now, newer.
    found = kept.find(["u2"])
    renew(kept, {"u2": rows["u2"]}, fold)
    assert kept.renew(["u2"], [older["u2"]], places([older["u2"]], fold), found) == [0]
    # All are forgotten, and their slots with them.
    several = {f"{user_id}-{n}": row for n in range(100) for user_id, row in rows.items()}
    renew(kept, several, fold)
    users, data = list(several), list(several.values())
    found = kept.find(users)
    kept.clear()
    assert kept.renew(users, data, places(data, fold), found) == []
    assert kept.get(users) == data
    assert kept.size_bytes == sum(row.size_bytes + 800 for row in data)


def test_the_order_of_use_holds_over_many_reads_of_many_users(rows, fold: Fold) -> None:
    """Against the obvious twin: a list with the least recently used first."""
    rng, row = np.random.default_rng(0), rows["u0"]
    kept, twin = KeptRows(20 * (row.size_bytes + 800), 10.0, Clock()), []
    for _ in range(300):
        users = [f"u{n}" for n in rng.choice(40, int(rng.integers(1, 6)), replace=False)]
        if rng.random() < 0.3:
            assert [bool(kept.get([user_id])[0]) for user_id in users] == [user_id in twin for user_id in users]
            users = [user_id for user_id in users if user_id in twin]
        for user_id in users:
            renew(kept, {user_id: row}, fold)
            twin = [*(other for other in twin if other != user_id), user_id][-20:]
    assert kept.size_bytes == 20 * (row.size_bytes + 800)
    users = [f"u{n}" for n in range(40)]
    there = [user_id for user_id, found in zip(users, kept.get(users), strict=True) if found is not None]
    assert there == [user_id for user_id in users if user_id in twin]
