"""The rows of a batch of users as the tensors that attention reads: the fast twin of decoding and folding each row.

`models.row.whole_cache` and `CacheBatch.of` say what the result is, bit for bit; a test holds both against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int64

from models.attention import CacheBatch
from models.cache_kernels import dense_kernel
from models.row import Fold, RowBytes
from models.row_places import SOUND, RowPlaces, place_rows


class DenseCaches(NamedTuple):
    """Caches on the device, and how many recent events of each user have an item beyond the table (read as unknown)."""

    caches: CacheBatch
    unknown_B: Int64[np.ndarray, "B"]


def placed(rows: Sequence[RowBytes | None], using: Fold) -> RowPlaces:
    """The rows checked and found where they lie; None for users that have none."""
    return place_rows(rows, using.spec, len(using.table.action_value_AHD))


def dense_caches(places: RowPlaces, using: Fold, device: torch.device) -> DenseCaches:
    """Caches of the sound rows; all other users are absent.

    The one copy that is made on the host is the one into these tensors; they are pinned where the device is a GPU, so
    that the copy to it goes on by itself.
    """
    spec, users = using.spec, len(places.place_B)
    pinned = device.type == "cuda"

    def new(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, pin_memory=pinned)

    mass_BHKR = new(users, spec.heads, spec.codewords, spec.rates, dtype=torch.float32)
    mean_BHKRD = new(*mass_BHKR.shape, spec.value_width, dtype=torch.float32)
    reference_ms_B, count_B = new(users, dtype=torch.int64), new(users, dtype=torch.int64)
    unknown_B = np.zeros(users, np.int64)
    dense_kernel(
        places.place_B,
        places.event_N,
        using.table.code_MG,
        using.table.value_MHD,
        using.table.action_value_AHD,
        spec.rate_GPR,
        mass_BHKR.numpy(),
        mean_BHKRD.numpy(),
        reference_ms_B.numpy(),
        count_B.numpy(),
        unknown_B,
    )
    present_B = torch.from_numpy(places.place_B["status"] == SOUND)
    caches = CacheBatch(
        mass_BHKR=mass_BHKR.to(device, non_blocking=True),
        mean_BHKRD=mean_BHKRD.to(device, non_blocking=True),
        reference_ms_B=reference_ms_B.to(device, non_blocking=True),
        count_B=count_B.to(device, non_blocking=True),
        present_B=present_B.to(device),
    )
    return DenseCaches(caches, unknown_B)
