"""A ranker as a worker serves it: the same scores as `Ranker.from_cache`, its plain twin, of the items of a table.

What depends on items and parameters alone is made once: every item's query, what the head takes of it, and how far from
0 a logit can be; and for the window over the newest events every item's vector.

Shapes: as in `models.ranker`; M items, X = H * E all key widths, V = H * D all value widths.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float, Int64

from models.attention import (
    REACH_MAX,
    CacheBatch,
    Entries,
    Weighed,
    entries_at,
    log_mass_at,
    read_entries,
    weighed_at,
)
from models.checkpoint import Sizes
from models.count_kernels import read_counts_kernel
from models.ranker import Ranker, VqlHistory
from models.read_kernels import mass_kernel, read_kernel
from models.request import History
from models.window import Window
from models.window_kernels import events_kernel, weights_kernel

ITEMS_AT_ONCE = 1 << 16
ROUNDING = 1.001


class ServedRanker:
    """Scores candidates from caches, as long as the parameters stay as they are.

    4 (X + V) bytes for each item, and with a window 4 d more.

    Raises TypeError for a model that reads no cache.
    """

    @torch.inference_mode()
    def __init__(self, ranker: Ranker) -> None:
        history = ranker.history
        if not isinstance(history, VqlHistory):
            raise TypeError(f"{type(history).__name__} cannot be read from a cache")
        self.ranker, self._history = ranker, history
        self._candidate_MV = of_items(ranker, ranker.candidate)
        self._window = None if history.window is None else ServedWindow(ranker, history.window)
        codeword_HKE, self._kernel = history.codewords().contiguous(), history.kernel()
        # A layer-normed query is, before it is scaled, no longer than the square root of its width.
        reach_H = history.log_temperature_H.exp() * codeword_HKE.norm(dim=-1).amax(dim=-1)
        self.queries = ItemQueries(
            of_items(ranker, lambda x_1Nd: history.queries(x_1Nd).flatten(2)),
            codeword_HKE,
            ROUNDING * float(reach_H.max()),
            history.sizes,
        )
        if codeword_HKE.device.type == "cpu":
            of_kernel = self._kernel.log_weight_HR.double(), self._kernel.rate_HR.double()
            of_mass = *of_kernel, history.mass_centre_H, history.mass_scale_H
            self._mass_tables = [table.detach().contiguous().numpy() for table in of_mass]
            none = np.empty((0, 0, 0), np.float32)
            mass_kernel(none, none[..., None], np.empty(0, np.int64), *self._mass_tables, none.copy())
        if ranker.counting is not None and ranker.cell_MQ.device.type == "cpu":
            # Compiled now too, of nobody's counts.
            nobody = (np.empty((0, 0), np.int64), ranker.cell_MQ.numpy(), np.empty((0, 0), np.int32))
            ages, none = np.empty(0, np.int64), np.empty((0, 0, 0), np.float32)
            read_counts_kernel(*nobody, none, ages, ranker.count_rate_R.numpy(), none)

    @property
    def reach(self) -> float:
        """How far from 0 the logit of a codeword can be."""
        return self.queries.reach

    def from_cache(
        self, candidate_BC: Int64[torch.Tensor, "B C"], cache: CacheBatch, now_ms_B: Int64[torch.Tensor, "B"]
    ) -> Float[torch.Tensor, "B C"]:
        """Logits of items by their index in the table."""
        compiled = self.queries.compiled
        entries = (weighed_at if compiled else entries_at)(cache, self._kernel, now_ms_B)
        seen_BCV = self.queries.read(candidate_BC, entries)
        if self._window is not None:
            seen_BCV = seen_BCV + self._window.read(candidate_BC, cache, now_ms_B)
        seen_BCX = self._with_mass(seen_BCV, cache, now_ms_B)
        counts = self._counts(candidate_BC, cache, now_ms_B)
        return self.ranker.head_logits(_rows(self._candidate_MV, candidate_BC), seen_BCX, counts)

    def _with_mass(self, seen_BCV: torch.Tensor, cache: CacheBatch, now_ms_B: torch.Tensor) -> torch.Tensor:
        """`VqlHistory.with_mass`, on a CPU in one call."""
        if seen_BCV.device.type != "cpu":
            return self._history.with_mass(seen_BCV, log_mass_at(cache, self._kernel, now_ms_B))
        inputs = (seen_BCV, cache.mass_BHKR, now_ms_B - cache.reference_ms_B)
        seen_BCX = np.empty((*seen_BCV.shape[:2], seen_BCV.shape[2] + self._history.told), np.float32)
        mass_kernel(*(tensor.contiguous().numpy() for tensor in inputs), *self._mass_tables, seen_BCX)
        return torch.from_numpy(seen_BCX)

    def _counts(
        self, candidate_BC: torch.Tensor, cache: CacheBatch, now_ms_B: torch.Tensor
    ) -> Float[torch.Tensor, "B C X"] | None:
        """`Ranker.counts_from_cache`, on a CPU in one call."""
        ranker = self.ranker
        if ranker.counting is None or candidate_BC.device.type != "cpu":
            return ranker.counts_from_cache(candidate_BC, cache, now_ms_B)
        count_BCX = np.empty((*candidate_BC.shape, ranker.count_width), np.float32)
        age_ms_B = now_ms_B - cache.reference_ms_B
        inputs = (candidate_BC, ranker.cell_MQ, cache.cell_BN, cache.cell_mass_BNR, age_ms_B, ranker.count_rate_R)
        read_counts_kernel(*(tensor.contiguous().numpy() for tensor in inputs), count_BCX)
        return torch.from_numpy(count_BCX)


class ItemQueries:
    """The queries of a table's items, and attention by them to the entries of codewords.

    compiled: on a CPU, where no logit is beyond REACH_MAX, by `read_kernel` in one pass; else by torch's operations.
    """

    def __init__(
        self,
        query_MX: Float[torch.Tensor, "M X"],
        codeword_HKE: Float[torch.Tensor, "H K E"],
        reach: float,
        sizes: Sizes,
    ) -> None:
        self._query_MX, self._codeword_HKE = query_MX.contiguous(), codeword_HKE
        self.reach, self._sizes = reach, sizes
        self.compiled = query_MX.device.type == "cpu" and reach <= REACH_MAX
        if self.compiled:
            self._kernel = read_kernel(sizes.key_width, sizes.value_width)
            # Compiled now, which takes a second where it is not on this machine's disk yet.
            mass_1HK = codeword_HKE.new_ones(1, *codeword_HKE.shape[:2])
            one = Weighed(mass_1HK, mass_1HK.new_ones(*mass_1HK.shape, sizes.value_width))
            self.read(torch.zeros(1, 1, dtype=torch.int64), one)

    def read(
        self, candidate_BC: Int64[torch.Tensor, "B C"], entries: Entries | Weighed
    ) -> Float[torch.Tensor, "B C V"]:
        """What each candidate sees of its user's entries.

        Where compiled, entries are weighed, and only there. Raises IndexError for an item beyond the table.
        """
        if not self.compiled:
            assert isinstance(entries, Entries)
            query_BCHE = _rows(self._query_MX, candidate_BC).unflatten(-1, (self._sizes.heads, -1))
            return read_entries(query_BCHE, self._codeword_HKE, entries, self.reach).flatten(2)
        assert isinstance(entries, Weighed)
        mass_BHK, mean_BHKD = entries
        out_BCV = np.empty((*candidate_BC.shape, self._sizes.heads * self._sizes.value_width), np.float32)
        inputs = (self._query_MX, candidate_BC, self._codeword_HKE, mass_BHK, mean_BHKD)
        self._kernel(*(tensor.contiguous().numpy() for tensor in inputs), out_BCV)
        return torch.from_numpy(out_BCV)


class ServedWindow:
    """A window over the newest events, of the items of a table; on a CPU compiled."""

    def __init__(self, ranker: Ranker, window: Window) -> None:
        self._window, self._encoder = window, ranker.encoder
        self._vector_Md = of_items(ranker, lambda x_1Nd: x_1Nd)
        self._compiled = self._vector_Md.device.type == "cpu"
        if self._compiled:
            assert window.age is not None
            ages = window.age.bucket.weight
            tables = (self._vector_Md, window.action.weight, ages, *window.folded(), window.value.weight)
            self._tables = [table.detach().contiguous().numpy() for table in tables]
            self._hidden, self._values = ages.shape[1], len(window.value.weight)
            slope, out_J, bias = window.last()
            self._unit = np.float32(slope.item()), out_J.numpy(), np.float32(bias.item())
            # Now too, of nobody's events.
            nothing = torch.zeros(1, window.sizes.newest)
            nobody = History(
                item_BL=nothing.long(), action_BL=nothing.long(), time_ms_BL=nothing.long(), weight_BL=nothing
            )
            self._read(torch.zeros(1, 1, dtype=torch.int64), nobody, torch.zeros(1, dtype=torch.int64))

    def read(
        self, candidate_BC: Int64[torch.Tensor, "B C"], cache: CacheBatch, now_ms_B: Int64[torch.Tensor, "B"]
    ) -> Float[torch.Tensor, "B C V"]:
        """What is added for each candidate. Raises ValueError as `Window.newest_in`."""
        newest = self._window.newest_in(cache)
        if self._compiled:
            return self._read(candidate_BC, newest, now_ms_B)
        event_BLd = _rows(self._vector_Md, self._encoder.known(newest.item_BL))
        return self._window(_rows(self._vector_Md, candidate_BC), event_BLd, newest, now_ms_B).flatten(2)

    def _read(self, candidate_BC: torch.Tensor, newest: History, now_ms_B: torch.Tensor) -> torch.Tensor:
        """User by user, so that what is between the two kernels is one user's."""
        candidate_BCd = _rows(self._vector_Md, candidate_BC)
        length = newest.item_BL.shape[1]
        bias_X = torch.empty(length * self._hidden)
        matrix_Xd = torch.empty(len(bias_X), candidate_BCd.shape[2])
        value_LV = torch.empty(length, self._values)
        unit_CL = torch.empty(candidate_BC.shape[1], length)
        seen_BCV = torch.empty(*candidate_BC.shape, self._values)
        events = [each.contiguous().numpy() for each in (newest.item_BL, newest.action_BL, newest.time_ms_BL)]
        weight_BL = newest.weight_BL.contiguous().numpy()
        for b, now_ms in enumerate(now_ms_B.tolist()):
            of_user = (each_BL[b] for each_BL in events)
            events_kernel(*of_user, now_ms, *self._tables, matrix_Xd.numpy(), bias_X.numpy(), value_LV.numpy())
            hidden_CX = torch.addmm(bias_X, candidate_BCd[b], matrix_Xd.T).numpy()
            weights_kernel(hidden_CX, *self._unit, weight_BL[b], unit_CL.numpy())
            torch.mm(unit_CL, value_LV, out=seen_BCV[b])
        return seen_BCV


def of_items(ranker: Ranker, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `make` makes of the vectors (1 N d to 1 N ...) of all items of the ranker's table, some at a time."""
    item_1M = torch.arange(len(ranker.encoder.feature_MF), device=ranker.encoder.feature_MF.device)[None]
    return torch.cat([make(ranker.encoder(item_1N))[0] for item_1N in item_1M.split(ITEMS_AT_ONCE, dim=1)])


def _rows(table_MX: torch.Tensor, at_BN: torch.Tensor) -> torch.Tensor:
    return table_MX.index_select(0, at_BN.flatten()).view(*at_BN.shape, -1)
