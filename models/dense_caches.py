"""The rows of a batch of users as the tensors that attention reads: the fast twin of decoding and folding each row.

`models.row.whole_cache`, `whole_counts`, `models.newest.newest_of` and `CacheBatch.of` say what the result is, bit for
bit; a test holds both against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from models.attention import CacheBatch, padded_counts
from models.cache_kernels import PLACE
from models.dense_kernel import dense_kernel
from models.newest import COLUMNS
from models.row import Fold, RowBytes, encode_row, new_row
from models.row_places import (
    ABSENT,
    RECORD_BYTES,
    SOUND,
    StoredRows,
    sizes_and_limits,
)
from models.turns import all_done, rows_there, turns


class DenseCaches(NamedTuple):
    """Caches on the device, and how many recent events of each user have an item beyond the table (read as unknown)."""

    caches: CacheBatch
    unknown_B: Int64[np.ndarray, "B"]


class DenseBatch:
    """The tensors of a batch of users, made of its rows as they come: all have to be filled in before `caches`.

    The one copy that is made on the host is the one into these tensors; they are pinned where the device is a GPU, so
    that the copy to it goes on by itself. place_B: each user's place (dtype PLACE), its addresses valid no longer.
    """

    def __init__(self, users: int, using: Fold, device: torch.device) -> None:
        spec, table, pinned = using.spec, using.table, device.type == "cuda"

        def new(dtype: type[np.generic], *shape: int) -> np.ndarray:
            # What the kernels write to is an array: torch's calls take longer, cold several times.
            if not pinned:
                return np.empty(shape, dtype)
            return torch.from_numpy(np.empty(shape, dtype)).pin_memory().numpy()

        self._users, self._device = users, device
        mass_BHKR = new(np.float32, users, spec.heads, spec.codewords, spec.rates)
        mean_BHKRD = new(np.float32, *mass_BHKR.shape, spec.value_width)
        reference_ms_B, count_B, self._unknown_B = new(np.int64, users), new(np.int64, users), np.zeros(users, np.int64)
        newest = {name: new(dtype, users, using.newest) for name, dtype in COLUMNS.items()}
        self.place_B = np.zeros(users, PLACE)
        self.place_B["status"] = ABSENT
        self._present_B = np.zeros(users, bool)
        # Of the same memory, and made now: a store that was asked is still at work.
        self._fields = {
            name: torch.from_numpy(array)
            for name, array in {
                **{"mass_BHKR": mass_BHKR, "mean_BHKRD": mean_BHKRD},
                **{"reference_ms_B": reference_ms_B, "count_B": count_B, "present_B": self._present_B},
                **{f"newest_{name}_BL": array for name, array in newest.items()},
            }.items()
        }
        if using.count_spec is None:
            self._fields |= padded_counts([], users)
        # Where rows lie, and what they lie in; where their counts go, and how many cells came of each.
        self._address_P, self._size_P = np.full((2, 2 * users), -1, np.int64)
        self._memory: list[Sequence[object]] = []
        self._count_rates = 0 if using.count_spec is None else using.count_spec.rates
        self._fields_counted = table.cell_MQ.shape[1]
        self._cells_at_B, self._masses_at_B, self._cells_B = np.zeros((3, users), np.int64)
        self._counts: list[tuple[np.ndarray, np.ndarray] | None] = [None] * users
        self._turns = turns(0, 0, users)
        self._kernel = dense_kernel(spec.heads // spec.groups, spec.rates, spec.value_width)
        self._arguments = (
            self._address_P,
            self._size_P,
            *sizes_and_limits(spec, len(table.action_value_AHD), using.count_spec),
            table.code_MG,
            table.value_MHD,
            table.action_value_AHD,
            spec.rate_GPR,
            table.cell_MQ,
            np.empty(0) if using.count_spec is None else using.count_spec.rate_HR[0],
            self.place_B,
            mass_BHKR,
            mean_BHKRD,
            reference_ms_B,
            count_B,
            self._unknown_B,
            *newest.values(),
            self._cells_at_B,
            self._masses_at_B,
            self._cells_B,
        )

    def fill(self, first: int, rows: Sequence[RowBytes | None]) -> None:
        """The rows of the users from `first` on, now."""
        self._bring(first, rows)
        self._kernel(turns(first, first + len(rows), first + len(rows)), *self._arguments)

    def offer(self, first: int, rows: Sequence[RowBytes | None]) -> None:
        """Rows for whoever has time for them (`work`): those of the users behind the ones that were offered before.

        From an earlier user on they are offered anew, which must not be while a thread is at work.
        """
        self._bring(first, rows)
        if first < self._turns[1]:
            taken = min(first, int(self._turns[0]))
            self._turns[:3] = taken, first, taken
        assert first == self._turns[1], f"rows from {first} on behind those up to {self._turns[1]}"
        rows_there(self._turns, first + len(rows))

    def work(self) -> None:
        """Fill in rows that were offered until none is left, beside other threads that do the same."""
        self._kernel(self._turns, *self._arguments)

    def is_done(self) -> bool:
        """Whether all rows that were offered are filled in; waits for a row that another thread is just at."""
        return all_done(self._turns)

    @property
    def is_behind(self) -> bool:
        """Whether rows that were offered wait for whoever takes them."""
        return bool(self._turns[0] < self._turns[1])

    @property
    def rows(self) -> StoredRows:
        """What was offered, where it lies."""
        return StoredRows(self._memory, self._address_P, self._size_P)

    def caches(self) -> DenseCaches:
        """The whole batch, on the device."""
        np.equal(self.place_B["status"], SOUND, out=self._present_B)
        fields = self._fields | (self._padded_counts() if self._count_rates else {})
        if self._device.type != "cpu":
            fields = {name: tensor.to(self._device, non_blocking=tensor.is_pinned()) for name, tensor in fields.items()}
        return DenseCaches(CacheBatch(**fields), self._unknown_B)

    def _padded_counts(self) -> dict[str, torch.Tensor]:
        """The counts of all whose row is sound, now that it is known how many there are."""
        counts = [
            (each[0][:cells], each[1][:cells]) if each is not None and present else None
            for each, cells, present in zip(self._counts, self._cells_B.tolist(), self._present_B.tolist(), strict=True)
        ]
        return padded_counts(counts, self._users)

    def _bring(self, first: int, rows: Sequence[RowBytes | None]) -> None:
        """Say where these rows lie, and where their counts go."""
        last = first + len(rows)
        # The kernel writes where it is told to, and would write beyond the tensors.
        assert 0 <= first <= last <= self._users, f"{len(rows)} rows from {first} on in {self._users}"
        stored = StoredRows.of(rows)
        self._memory.append(stored.memory)
        self._address_P[2 * first : 2 * last], self._size_P[2 * first : 2 * last] = stored.address_P, stored.size_P
        if self._count_rates:
            self._make_room_for_counts(first, last)

    def _make_room_for_counts(self, first: int, last: int) -> None:
        """For as many cells as the bytes of these rows can hold, and their recent events touch."""
        folded_b, recent_b = np.maximum(self._size_P[2 * first : 2 * last].reshape(-1, 2), 0).T
        most_b = folded_b // (2 + 4 + 4 * self._count_rates) + recent_b // RECORD_BYTES * self._fields_counted
        start_b, most = np.cumsum(most_b) - most_b, int(most_b.sum())
        cell_N, mass_NR = np.empty(most, np.uint16), np.empty((most, self._count_rates), np.float32)
        self._cells_at_B[first:last] = cell_N.ctypes.data + cell_N.strides[0] * start_b
        self._masses_at_B[first:last] = mass_NR.ctypes.data + mass_NR.strides[0] * start_b
        self._counts[first:last] = [(cell_N[start:], mass_NR[start:]) for start in start_b.tolist()]


def compile_kernels(using: Fold) -> None:
    """Compile what is not on this machine's disk yet, which takes seconds, before a batch waits for it."""
    DenseBatch(1, using, torch.device("cpu")).fill(0, [encode_row(new_row(using.spec, 0, 0))])


def dense_caches(rows: Sequence[RowBytes | None], using: Fold, device: torch.device) -> DenseCaches:
    """Caches of the sound rows; all other users are absent."""
    batch = DenseBatch(len(rows), using, device)
    batch.fill(0, rows)
    return batch.caches()
