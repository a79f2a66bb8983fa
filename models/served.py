"""A ranker as a worker serves it: the same scores as `Ranker.from_cache`, its plain twin, of the items of a table.

What depends on items and parameters alone is made once: every item's query, and how far from 0 a logit can be.

Shapes: as in `models.ranker`; M items, X = H * E all key widths.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64

from models.attention import CacheBatch, entries_at, read_entries
from models.ranker import Ranker, VqlHistory

ITEMS_AT_ONCE = 1 << 16
ROUNDING = 1.001


class ServedRanker:
    """Scores candidates from caches, as long as the parameters stay as they are. 4 X bytes for each item.

    Raises TypeError for a model that reads no cache.
    """

    @torch.inference_mode()
    def __init__(self, ranker: Ranker) -> None:
        history = ranker.history
        if not isinstance(history, VqlHistory):
            raise TypeError(f"{type(history).__name__} cannot be read from a cache")
        self.ranker = ranker
        self._heads = (history.sizes.heads, history.sizes.key_width)
        item_1M = torch.arange(len(ranker.encoder.feature_MF), device=ranker.encoder.feature_MF.device)[None]
        parts = item_1M.split(ITEMS_AT_ONCE, dim=1)
        self._query_MX = torch.cat([history.queries(ranker.encoder(item_1N))[0].flatten(1) for item_1N in parts])
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
        counts = self.ranker.counts_from_cache(candidate_BC, cache, now_ms_B)
        return self.ranker.logits(self.ranker.encoder(candidate_BC), seen_BCHD.flatten(2), counts)
