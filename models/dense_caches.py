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
from models.cache import CacheSpec
from models.cache_kernels import PLACE, dense_kernel
from models.count_kernels import count_rows_kernel
from models.newest import COLUMNS, newest_kernel
from models.row import Fold, RowBytes, encode_row, new_row
from models.row_places import ABSENT, SOUND, RowPlaces, place_rows


class DenseCaches(NamedTuple):
    """Caches on the device, and how many recent events of each user have an item beyond the table (read as unknown)."""

    caches: CacheBatch
    unknown_B: Int64[np.ndarray, "B"]


def placed(rows: Sequence[RowBytes | None], using: Fold) -> RowPlaces:
    """The rows checked and found where they lie; None for users that have none."""
    return place_rows(rows, using.spec, len(using.table.action_value_AHD), using.count_spec)


class DenseBatch:
    """The tensors of a batch of users, filled part by part as rows come: every part has to come before `caches`.

    The one copy that is made on the host is the one into these tensors; they are pinned where the device is a GPU, so
    that the copy to it goes on by itself. place_B: each user's place (dtype PLACE), its addresses valid no longer.
    """

    def __init__(self, users: int, using: Fold, device: torch.device) -> None:
        spec, pinned = using.spec, device.type == "cuda"

        def new(dtype: type[np.generic], *shape: int) -> np.ndarray:
            # What the kernels write to is an array: torch's calls take longer, cold several times.
            if not pinned:
                return np.empty(shape, dtype)
            return torch.from_numpy(np.empty(shape, dtype)).pin_memory().numpy()

        self._using, self._device = using, device
        self._kernel = dense_kernel(spec.heads // spec.groups, spec.rates, spec.value_width)
        mass_BHKR = new(np.float32, users, spec.heads, spec.codewords, spec.rates)
        mean_BHKRD = new(np.float32, *mass_BHKR.shape, spec.value_width)
        self._written = [mass_BHKR, mean_BHKRD, new(np.int64, users), new(np.int64, users), np.zeros(users, np.int64)]
        self._newest = {name: new(dtype, users, using.newest) for name, dtype in COLUMNS.items()}
        self.place_B = np.zeros(users, PLACE)
        self.place_B["status"] = ABSENT
        self._present_B = np.zeros(users, bool)
        # Of the same memory, and made now: a store that was asked is still at work.
        self._fields = {
            name: torch.from_numpy(array)
            for name, array in {
                **dict(zip(("mass_BHKR", "mean_BHKRD", "reference_ms_B", "count_B"), self._written, strict=False)),
                "present_B": self._present_B,
                **{f"newest_{name}_BL": array for name, array in self._newest.items()},
            }.items()
        }
        self._counts: list[tuple[np.ndarray, np.ndarray] | None] = [None] * users

    def fill(self, first: int, rows: Sequence[RowBytes | None]) -> None:
        """The rows of the users from `first` on."""
        self.scatter(first, placed(rows, self._using))

    def scatter(self, first: int, places: RowPlaces) -> None:
        """`fill` with rows that are found already."""
        users = len(places.place_B)
        # The kernel writes where it is told to, and would write beyond the tensors.
        assert 0 <= first <= len(self.place_B) - users, f"{users} rows from {first} on in {len(self.place_B)}"
        at = slice(first, first + users)
        using, table = self._using, self._using.table
        self._kernel(
            places.place_B,
            places.event_N,
            table.code_MG,
            table.value_MHD,
            table.action_value_AHD,
            using.spec.rate_GPR,
            *(array[at] for array in self._written),
        )
        if using.newest:
            # After the kernel, which takes items beyond the table for the unknown one.
            newest_kernel(places.place_B, places.event_N, *(array[at] for array in self._newest.values()))
        if using.count_spec is not None:
            reference_ms_B = self._written[2][at]
            self._counts[at] = _counts(places, reference_ms_B, using.count_spec, table.cell_MQ)
        self.place_B[at] = places.place_B

    def caches(self) -> DenseCaches:
        """The whole batch, on the device."""
        np.equal(self.place_B["status"], SOUND, out=self._present_B)
        fields = self._fields | padded_counts(self._counts, len(self._counts))
        if self._device.type != "cpu":
            fields = {name: tensor.to(self._device, non_blocking=tensor.is_pinned()) for name, tensor in fields.items()}
        return DenseCaches(CacheBatch(**fields), self._written[-1])


def compile_kernels(using: Fold) -> None:
    """Compile what is not on this machine's disk yet, which takes seconds, before a batch waits for it."""
    DenseBatch(1, using, torch.device("cpu")).fill(0, [encode_row(new_row(using.spec, 0, 0))])


def dense_caches(places: RowPlaces, using: Fold, device: torch.device) -> DenseCaches:
    """Caches of the sound rows; all other users are absent."""
    batch = DenseBatch(len(places.place_B), using, device)
    batch.scatter(0, places)
    return batch.caches()


def _counts(
    places: RowPlaces, reference_ms_B: np.ndarray, spec: CacheSpec, cell_MQ: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray] | None]:
    """Each user's cells and masses, as of these times; None for users without a sound row."""
    place_B, rate_R = places.place_B, spec.rate_HR[0]
    sound_B = place_B["status"] == SOUND
    most_B = np.where(sound_B, place_B["cell_entries"] + place_B["events"] * cell_MQ.shape[1], 0)
    start_B, size_B = np.cumsum(most_B) - most_B, np.zeros(len(place_B), np.int64)
    cell_N, mass_NR = np.empty(most_B.sum(), np.uint16), np.empty((most_B.sum(), len(rate_R)), np.float32)
    count_rows_kernel(places.place_B, places.event_N, cell_MQ, rate_R, reference_ms_B, start_B, cell_N, mass_NR, size_B)
    bounds = zip(sound_B.tolist(), start_B.tolist(), (start_B + size_B).tolist(), strict=True)
    return [(cell_N[start:end], mass_NR[start:end]) if sound else None for sound, start, end in bounds]
