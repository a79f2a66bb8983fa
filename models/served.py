"""A ranker as a worker serves it: the same scores as `Ranker.from_cache`, its plain twin, of the items of a table.

What depends on items and parameters alone is made once: every item's query, and how far from 0 a logit can be; and for
the window over the newest events every item's query, gate, key and value.

Shapes: as in `models.ranker`; M items, X = H * E all key widths, V = H * D all value widths.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int64

from models.attention import CacheBatch, Entries, entries_at, log_weights, read_entries
from models.ranker import Ranker, VqlHistory
from models.window import Window

ITEMS_AT_ONCE = 1 << 16
ROUNDING = 1.001


class ServedRanker:
    """Scores candidates from caches, as long as the parameters stay as they are.

    4 X bytes for each item, and with a window 4 (2 X + V + H) more.

    Raises TypeError for a model that reads no cache.
    """

    @torch.inference_mode()
    def __init__(self, ranker: Ranker) -> None:
        history = ranker.history
        if not isinstance(history, VqlHistory):
            raise TypeError(f"{type(history).__name__} cannot be read from a cache")
        self.ranker = ranker
        self._heads = (history.sizes.heads, history.sizes.key_width)
        self._query_MX = of_items(ranker, lambda x_1Nd: history.queries(x_1Nd).flatten(2))
        self._window = None if history.window is None else ServedWindow(ranker, history.window)
        self._codeword_HKE, self._kernel = history.codewords().contiguous(), history.kernel()
        # A layer-normed query is, before it is scaled, no longer than the square root of its width.
        reach_H = history.log_temperature_H.exp() * self._codeword_HKE.norm(dim=-1).amax(dim=-1)
        self.reach = ROUNDING * float(reach_H.max())

    def from_cache(
        self, candidate_BC: Int64[torch.Tensor, "B C"], cache: CacheBatch, now_ms_B: Int64[torch.Tensor, "B"]
    ) -> Float[torch.Tensor, "B C"]:
        """Logits of items by their index in the table."""
        query_NX = self._query_MX.index_select(0, candidate_BC.flatten())
        query_BCHE = query_NX.view(*candidate_BC.shape, *self._heads)
        entries = entries_at(cache, self._kernel, now_ms_B)
        seen_BCHD = read_entries(query_BCHE, self._codeword_HKE, entries, self.reach)
        if self._window is not None:
            seen_BCHD = seen_BCHD + self._window.read(candidate_BC, cache, now_ms_B)
        counts = self.ranker.counts_from_cache(candidate_BC, cache, now_ms_B)
        return self.ranker.logits(self.ranker.encoder(candidate_BC), seen_BCHD.flatten(2), counts)


class ServedWindow:
    """A window over the newest events, of the items of a table."""

    def __init__(self, ranker: Ranker, window: Window) -> None:
        self._window, self._encoder = window, ranker.encoder
        self._query_MX = of_items(ranker, lambda x_1Nd: window.candidates(x_1Nd).query_BCHE.flatten(2))
        self._gate_MH = of_items(ranker, lambda x_1Nd: window.candidates(x_1Nd).gate_BCH)
        self._key_MX = of_items(ranker, lambda x_1Nd: window.keys(x_1Nd).flatten(2))
        self._value_MV = of_items(ranker, lambda x_1Nd: window.values(x_1Nd).flatten(2))
        self._kernel = window.kernel()
        # Keys are layer-normed too.
        self.reach = ROUNDING * float(window.log_temperature_H.exp().max()) * math.sqrt(window.sizes.key_width)

    def read(
        self, candidate_BC: Int64[torch.Tensor, "B C"], cache: CacheBatch, now_ms_B: Int64[torch.Tensor, "B"]
    ) -> Float[torch.Tensor, "B C H D"]:
        """What is added for each candidate. Raises ValueError as `Window.newest_in`."""
        newest = self._window.newest_in(cache)
        item_BL, heads = self._encoder.known(newest.item_BL), (self._window.sizes.heads, -1)
        value_BLHD = self._window.with_actions(_rows(self._value_MV, item_BL).unflatten(-1, heads), newest)
        entries = Entries(
            log_weights(self._kernel, newest.time_ms_BL, newest.weight_BL, now_ms_B), value_BLHD.transpose(1, 2)
        )
        query_BCHE = _rows(self._query_MX, candidate_BC).unflatten(-1, heads)
        key_BHLE = _rows(self._key_MX, item_BL).unflatten(-1, heads).transpose(1, 2)
        return _rows(self._gate_MH, candidate_BC)[..., None] * read_entries(query_BCHE, key_BHLE, entries, self.reach)


def of_items(ranker: Ranker, make: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """What `make` makes of the vectors (1 N d to 1 N ...) of all items of the ranker's table, some at a time."""
    item_1M = torch.arange(len(ranker.encoder.feature_MF), device=ranker.encoder.feature_MF.device)[None]
    return torch.cat([make(ranker.encoder(item_1N))[0] for item_1N in item_1M.split(ITEMS_AT_ONCE, dim=1)])


def _rows(table_MX: torch.Tensor, at_BN: torch.Tensor) -> torch.Tensor:
    return table_MX.index_select(0, at_BN.flatten()).view(*at_BN.shape, -1)
