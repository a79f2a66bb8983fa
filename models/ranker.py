"""The ranker: one frame (item encoder, head) around one way to read a user's history.

The frame is shared by VQL and its rivals, so that a comparison compares only the history. VQL's way is
`VqlHistory`: layer-normed queries and keys, keys quantised by group, values exact, a separable temporal kernel.
It trains on raw histories, then on timelines in chunks, and serves from caches: all give the same scores (a test).

Beside the history, the head sees how often the user has met the candidate and its like (`models.counts`), if the
checkpoint counts: log(1 + count), with any way to read a history.

Shapes: as in `attention`; N items, d model width, V = H * D all value widths, F item fields.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Float, Float64, Int64, Integer
from msgspec import structs
from torch import nn
from torch.nn import functional

from models.attention import (
    CacheBatch,
    centred,
    log_mass_at,
    log_weights,
    normed_heads,
    read,
    read_counts,
    read_history,
    scaled_queries,
)
from models.checkpoint import Sizes
from models.chunked import read_timelines
from models.codebook import Codebook
from models.context_layers import ItemVectors, TagMean
from models.counts import Counter, CountPlan
from models.item_context import Context
from models.item_table import UNKNOWN
from models.request import PADDING, Request, TimelineBatch
from models.states import Impressions, Timelines
from models.temporal import TemporalKernel
from models.window import Window, newest_before

# Share of item ids hidden in each training batch: a new item then reads as its category, an unknown one as any item,
# and neither as the noise of an embedding row that was never trained.
UNKNOWN_SHARE = 0.02
# Events that an impression attends one by one in training, at most; all before are a state. No result depends on it.
CHUNK = 64


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """All that a ranker is built from: sizes, half-lives (H x R, null: never), actions, rows per item field, counts.

    category_field: the item field whose value is the code of group 0, if one is. context: the item features beside the
    fields, if there are any.
    """

    sizes: Sizes
    half_life_ms: list[list[float | None]]
    actions: int
    field_rows: list[int]
    counting: CountPlan | None = None
    category_field: int | None = None
    context: Context | None = None

    def without_window(self) -> Shape:
        """All but the window over the newest events."""
        return replace(self, sizes=structs.replace(self.sizes, newest=0))


class HistoryReader(Protocol):
    """A way to turn candidates and a history into one vector per candidate."""

    def __call__(
        self, candidate_BCd: torch.Tensor, encoder: ItemEncoder, request: Request | TimelineBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The history as seen by each candidate (B C V) and an auxiliary loss (scalar).

        What is beyond V the head takes as it is: as many numbers as the reader's `told`, if it has that.
        """
        ...


class ItemEncoder(nn.Module):
    """Static item context to a vector: the sum of one embedding per field (the id is one) and number, of the mean of
    those of the tags, and of what the vectors add.

    `feature_MF` holds each known item's embedding rows: fields, numbers, tags (`models.item_context`); row 0, and
    embedding row 0 of every feature, is "unknown".
    """

    feature_MF: torch.Tensor

    def __init__(self, shape: Shape, feature_MF: Int64[torch.Tensor, "M F"]) -> None:
        super().__init__()
        context, width = shape.context or Context(), shape.sizes.width
        rows = [*shape.field_rows, *context.number_rows]
        fields = [nn.Embedding(count, width, sparse=(f == 0)) for f, count in enumerate(rows)]
        for field in fields:
            nn.init.normal_(field.weight, std=width**-0.5)
        self.fields = nn.ModuleList(fields)
        self.tags = nn.ModuleList([TagMean(tags, width) for tags in context.tags.values()])
        self.most_tags = [tags.most for tags in context.tags.values()]
        self.vectors = ItemVectors(context.vector_width, width) if context.vectors else None
        # The features are facts of the log, not parameters: they are not saved with the model.
        self.register_buffer("feature_MF", feature_MF, persistent=False)

    def forward(self, item: Int64[torch.Tensor, "*N"]) -> Float[torch.Tensor, "*N d"]:
        """Vectors of known items by index, of the rows that `features` gives."""
        return self.encode(self.features(item))

    def features(self, item: Int64[torch.Tensor, "*N"]) -> Int64[torch.Tensor, "*N F"]:
        """Embedding rows of known items, and where there are vectors the item that has them as one column more.

        In training a few ids, and of half of these all that is known of the item, are hidden.
        """
        feature = self.feature_MF[item]
        if self.vectors is not None:
            feature = torch.cat([feature, item[..., None]], dim=-1)
        if self.training:
            # Drawn on the CPU, whose generator a run saves.
            draw = torch.rand(item.shape).to(item.device)[..., None]
            hidden = torch.cat([draw < UNKNOWN_SHARE, (draw < UNKNOWN_SHARE / 2).expand_as(feature[..., 1:])], dim=-1)
            feature = torch.where(hidden, 0, feature)
        return feature

    def known(self, item_N: Int64[torch.Tensor, "*N"]) -> Int64[torch.Tensor, "*N"]:
        """The same items, and the unknown one for those beyond the features: a row may hold what was encoded since."""
        return torch.where(item_N < len(self.feature_MF), item_N, UNKNOWN)

    def encode(self, feature_NF: Int64[torch.Tensor, "*N F"]) -> Float[torch.Tensor, "*N d"]:
        """Vectors from what `features` gives."""
        if self.vectors is None:
            return self.of_rows(feature_NF)
        return self.of_rows(feature_NF[..., :-1]) + self.vectors(feature_NF[..., -1])

    def of_rows(self, feature_NF: Int64[torch.Tensor, "*N F"]) -> Float[torch.Tensor, "*N d"]:
        """What embedding rows alone add up to: also for items the model has never seen (their id is row 0)."""
        parts = [field(feature_NF[..., f]) for f, field in enumerate(self.fields)]
        of_tags = feature_NF[..., len(self.fields) :].split(self.most_tags, dim=-1) if self.most_tags else ()
        parts += [tags(row_NT) for tags, row_NT in zip(self.tags, of_tags, strict=True)]
        return torch.stack(parts).sum(dim=0)


class VqlHistory(nn.Module):
    """Attention over the whole history with grouped, quantised keys (VQL, arXiv 2508.17125).

    Where sizes have one, a window over the newest events adds what it sees (`models.window`).

    A softmax has a total of 1, whether it is over three events or ten thousand. So beside what candidates see the head
    is told how much there was to see: log(1 + sum_i w_i kappa_h(now - t_i)) of each head, standardised.
    """

    mass_centre_H: torch.Tensor
    mass_scale_H: torch.Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        sizes = shape.sizes
        self.sizes = sizes
        self.key = nn.Linear(sizes.width, sizes.heads * sizes.key_width, bias=False)
        self.query = nn.Linear(sizes.width, sizes.heads * sizes.key_width, bias=False)
        self.query.weight.data.copy_(self.key.weight.data)
        self.value = nn.Linear(sizes.width, sizes.heads * sizes.value_width, bias=False)
        self.action_value_AHD = nn.Parameter(torch.zeros(shape.actions, sizes.heads, sizes.value_width))
        self.log_temperature_H = nn.Parameter(torch.zeros(sizes.heads))
        self.kernel = TemporalKernel(shape.half_life_ms)
        group_width = sizes.heads // sizes.groups * sizes.key_width
        self.codebook = Codebook(sizes.groups, sizes.codewords, group_width)
        self.category_field = shape.category_field
        self.told = sizes.heads
        self.register_buffer("mass_centre_H", torch.zeros(sizes.heads))
        self.register_buffer("mass_scale_H", torch.ones(sizes.heads))
        self.window = Window(sizes, shape.actions) if sizes.newest else None
        if self.window is not None:
            # As the candidate's own projection does, it starts as the values of the history.
            self.window.value.weight.data.copy_(self.value.weight.data)

    def forward(self, candidate_BCd, encoder, request):
        if isinstance(request, TimelineBatch):
            return self._of_timelines(candidate_BCd, encoder, request)
        history = request.history
        item_U, at_BL = torch.unique(history.item_BL, return_inverse=True)
        feature_UF = encoder.features(item_U)
        x_Ud = encoder.encode(feature_UF)
        key_UHE, commitment = self._quantised(self.keys(x_Ud), self._given(feature_UF))
        value_BLHD = _take(self.values(x_Ud), at_BL) + _take(self.action_value_AHD, history.action_BL)
        log_BHL = log_weights(self.kernel(), history.time_ms_BL, history.weight_BL, request.now_ms_B)
        out_BCHD = read_history(self.queries(candidate_BCd), _take(key_UHE, at_BL), value_BLHD, centred(log_BHL))
        if self.window is not None:
            event_BLd = functional.embedding(at_BL[:, -self.sizes.newest :], x_Ud)
            newest = history.newest(self.sizes.newest)
            out_BCHD = out_BCHD + self.window(candidate_BCd, event_BLd, newest, request.now_ms_B)
        return self.with_mass(out_BCHD.flatten(2), log_BHL.detach().logsumexp(dim=-1)), commitment

    def _of_timelines(
        self, candidate_BCd: torch.Tensor, encoder: ItemEncoder, batch: TimelineBatch
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The same from timelines that impressions share, once the codebook has started."""
        assert self.codebook.started, "exact keys have no states: collate requests until the codebook starts"
        item_U, at_M = torch.unique(batch.item_M, return_inverse=True)
        feature_UF = encoder.features(item_U)
        x_Ud = encoder.encode(feature_UF)
        key_UHE = self.keys(x_Ud)
        code_UG = self.codebook.encode(self._grouped(key_UHE), self._given(feature_UF))
        straight_UGF, commitment = self.codebook.straight_through(self._grouped(key_UHE), code_UG)
        events = Timelines(
            key_MHE=_take(straight_UGF.reshape(key_UHE.shape), at_M),
            code_MH=code_UG.repeat_interleave(self.sizes.heads // self.sizes.groups, dim=1)[at_M],
            value_MHD=_take(self.values(x_Ud), at_M) + _take(self.action_value_AHD, batch.action_M),
            time_ms_M=batch.time_ms_M,
            weight_M=batch.weight_M,
        )
        asked = Impressions(
            query_BCHE=self.queries(candidate_BCd),
            first_B=batch.first_B,
            end_B=batch.end_B,
            now_ms_B=batch.now_ms_B,
        )
        out_BCHD, log_mass_BH = read_timelines(asked, events, self.codewords(), self.kernel(), CHUNK)
        if self.window is not None:
            place_BL, newest = newest_before(batch, self.sizes.newest)
            event_BLd = functional.embedding(at_M[place_BL], x_Ud)
            out_BCHD = out_BCHD + self.window(candidate_BCd, event_BLd, newest, batch.now_ms_B)
        return self.with_mass(out_BCHD.flatten(2), log_mass_BH), commitment

    def from_cache(
        self, candidate_BCd: torch.Tensor, encoder: ItemEncoder, cache: CacheBatch, now_ms_B: torch.Tensor
    ) -> Float[torch.Tensor, "B C X"]:
        """The same vector, read from caches instead of the history. Raises ValueError as `Window.newest_in`."""
        out_BCHD = read(self.queries(candidate_BCd), self.codewords(), cache, self.kernel(), now_ms_B)
        if self.window is not None:
            newest = self.window.newest_in(cache)
            event_BLd = encoder(encoder.known(newest.item_BL))
            out_BCHD = out_BCHD + self.window(candidate_BCd, event_BLd, newest, now_ms_B)
        return self.with_mass(out_BCHD.flatten(2), log_mass_at(cache, self.kernel(), now_ms_B))

    def with_mass(
        self, seen_BCV: Float[torch.Tensor, "B C V"], log_mass_BH: Float64[torch.Tensor, "B H"]
    ) -> Float[torch.Tensor, "B C X"]:
        """What candidates see, and beside it how much there was to see: X = V + H."""
        log_BH = functional.softplus(log_mass_BH.detach()).float()
        mass_BH = (log_BH - self.mass_centre_H) * self.mass_scale_H
        return torch.cat([seen_BCV, mass_BH[:, None].expand(-1, seen_BCV.shape[1], -1)], dim=-1)

    @torch.no_grad()
    def standardise_mass(self, requests: Iterable[Request]) -> None:
        """Let the head see masses with the mean 0 and the deviation 1 that they have over these requests."""
        kernel, logs = self.kernel(), []
        for one in requests:
            # Summed at once: the weights of all events of all requests would be gigabytes where histories are long.
            log_BHL = log_weights(kernel, one.history.time_ms_BL, one.history.weight_BL, one.now_ms_B)
            logs.append(log_BHL.logsumexp(dim=-1))
        log_NH = functional.softplus(torch.cat(logs)).float()
        _standardise(log_NH, self.mass_centre_H, self.mass_scale_H)

    def queries(self, x_BCd: torch.Tensor) -> Float[torch.Tensor, "B C H E"]:
        """Layer-normed queries, scaled by the temperature and 1 / sqrt(E)."""
        return scaled_queries(self.query(x_BCd), self.log_temperature_H)

    def keys(self, x_Nd: torch.Tensor) -> Float[torch.Tensor, "N H E"]:
        """Layer-normed keys: a function of static item context alone."""
        return normed_heads(self.key(x_Nd), self.sizes.heads)

    def values(self, x_Nd: torch.Tensor) -> Float[torch.Tensor, "N H D"]:
        return self.value(x_Nd).unflatten(-1, (self.sizes.heads, self.sizes.value_width))

    def codes(self, x_Nd: torch.Tensor, feature_NF: Int64[torch.Tensor, "N F"]) -> Int64[torch.Tensor, "N G"]:
        """The codes of items, as the item table holds them, from their vectors and embedding rows."""
        return self.codebook.encode(self._grouped(self.keys(x_Nd)), self._given(feature_NF))

    def grouped_keys(
        self, encoder: ItemEncoder, item_N: Int64[torch.Tensor, "N"]
    ) -> tuple[Float[torch.Tensor, "N G F"], Int64[torch.Tensor, "N"] | None]:
        """The keys of known items as the codebook has them, and the codes that are given."""
        feature_NF = encoder.features(item_N)
        return self._grouped(self.keys(encoder.encode(feature_NF))), self._given(feature_NF)

    def codewords(self) -> Float[torch.Tensor, "H K E"]:
        """Each head's slice of its group's codewords."""
        per_group = self.sizes.heads // self.sizes.groups
        slices = self.codebook.codeword_GKF.unflatten(-1, (per_group, self.sizes.key_width))
        return slices.transpose(1, 2).flatten(0, 1)

    def _given(self, feature_NF: torch.Tensor) -> torch.Tensor | None:
        """The codes of group 0, where they are the items' categories: 0 is the unknown one."""
        return None if self.category_field is None else feature_NF[:, self.category_field] % self.sizes.codewords

    def _quantised(self, key_UHE: torch.Tensor, given_U: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        quantised_UGF, commitment = self.codebook(self._grouped(key_UHE), given_U)
        return quantised_UGF.reshape(key_UHE.shape), commitment

    def _grouped(self, key_NHE: torch.Tensor) -> torch.Tensor:
        return key_NHE.reshape(len(key_NHE), self.sizes.groups, -1)


class Ranker(nn.Module):
    """Scores candidates from their own context, from what `history` reads of the user, and from counts.

    cell_MQ: what each item is counted as, for a shape that counts: as rows have it (`CountPlan.cells_of`), or, for a
    rival, exactly (`counts.exact_cells`).
    """

    cell_MQ: torch.Tensor
    count_rate_R: torch.Tensor
    count_centre_X: torch.Tensor
    count_scale_X: torch.Tensor

    def __init__(
        self,
        shape: Shape,
        feature_MF: Int64[torch.Tensor, "M F"],
        history: nn.Module,
        cell_MQ: Integer[np.ndarray, "M Q"] | None = None,
    ) -> None:
        super().__init__()
        counting = shape.counting
        cell_MQ = np.zeros((len(feature_MF), 0), np.uint16) if cell_MQ is None else cell_MQ
        if counting is not None and cell_MQ.shape[1] != len(counting.fields):
            raise ValueError(f"{cell_MQ.shape[1]} cells per item for {len(counting.fields)} counted fields")
        self.counting = counting
        self.count_width = 0 if counting is None else counting.width
        self.register_buffer("cell_MQ", torch.from_numpy(cell_MQ.astype(np.int32)), persistent=False)
        rate_R = torch.empty(0, dtype=torch.float64) if counting is None else torch.from_numpy(counting.rate_R)
        self.register_buffer("count_rate_R", rate_R, persistent=False)
        if counting is not None:
            self.register_buffer("count_centre_X", torch.zeros(self.count_width))
            self.register_buffer("count_scale_X", torch.ones(self.count_width))
        value_width = shape.sizes.heads * shape.sizes.value_width
        self.encoder = ItemEncoder(shape, feature_MF)
        self.history = history
        self.candidate = nn.Linear(shape.sizes.width, value_width, bias=False)
        value = getattr(history, "value", None)
        if isinstance(value, nn.Linear):
            self.candidate.weight.data.copy_(value.weight.data)
        given = 3 * value_width + getattr(history, "told", 0) + self.count_width
        self.head = nn.Sequential(nn.Linear(given, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, request: Request | TimelineBatch) -> tuple[Float[torch.Tensor, "B C"], Float[torch.Tensor, ""]]:
        """Logits from raw events, and the history's auxiliary loss: the training form. Only VQL reads timelines."""
        x_BCd = self.encoder(request.candidate_BC)
        seen_BCX, auxiliary = self.history(x_BCd, self.encoder, request)
        return self.logits(x_BCd, seen_BCX, request.count_BCX), auxiliary

    def from_cache(
        self,
        candidate_BC: Int64[torch.Tensor, "B C"],
        cache: CacheBatch,
        now_ms_B: Int64[torch.Tensor, "B"],
    ) -> Float[torch.Tensor, "B C"]:
        """Logits from caches: the serving form. Equal to `forward` over the same events."""
        if not isinstance(self.history, VqlHistory):
            raise TypeError(f"{type(self.history).__name__} cannot be read from a cache")
        x_BCd = self.encoder(candidate_BC)
        seen_BCX = self.history.from_cache(x_BCd, self.encoder, cache, now_ms_B)
        return self.logits(x_BCd, seen_BCX, self.counts_from_cache(candidate_BC, cache, now_ms_B))

    def counts_from_cache(
        self, candidate_BC: torch.Tensor, cache: CacheBatch, now_ms_B: torch.Tensor
    ) -> Float[torch.Tensor, "B C X"] | None:
        """The candidates' counts as `logits` takes them; None where nothing is counted."""
        if self.counting is None:
            return None
        return read_counts(self.cell_MQ[candidate_BC], cache, self.count_rate_R, now_ms_B)

    def logits(
        self,
        x_BCd: Float[torch.Tensor, "B C d"],
        seen_BCX: Float[torch.Tensor, "B C X1"],
        count_BCX: Float[torch.Tensor, "B C X"] | None = None,
    ) -> Float[torch.Tensor, "B C"]:
        """Logits from the candidates' vectors, what each of them sees of the history with what the head is told
        beside it, and counts (None: no counts).

        Raises ValueError as `head_logits`.
        """
        return self.head_logits(self.candidate(x_BCd), seen_BCX, count_BCX)

    def head_logits(
        self,
        candidate_BCV: Float[torch.Tensor, "B C V"],
        seen_BCX: Float[torch.Tensor, "B C X1"],
        count_BCX: Float[torch.Tensor, "B C X"] | None = None,
    ) -> Float[torch.Tensor, "B C"]:
        """The same from the candidates as values (`candidate`), which a server has made for all items.

        Raises ValueError for counts that the head does not know, or for none where it needs them.
        """
        seen_BCV = seen_BCX[..., : candidate_BCV.shape[-1]]
        parts = [candidate_BCV, seen_BCX, candidate_BCV * seen_BCV]
        width = 0 if count_BCX is None else count_BCX.shape[-1]
        if width != self.count_width:
            raise ValueError(f"{width} counts for a head of {self.count_width}; collate with the ranker's counter")
        if count_BCX is not None and width:
            parts.append((count_BCX.log1p() - self.count_centre_X) * self.count_scale_X)
        return self.head(torch.cat(parts, dim=-1))[..., 0]

    @torch.no_grad()
    def standardise_counts(self, count_NX: Float[torch.Tensor, "N X"]) -> None:
        """Let the head see log(1 + count) with the mean 0 and the deviation 1 that it has over these candidates.

        A user's events in a category are many, an item's are few: unscaled, the head learns the item's too late.
        """
        _standardise(count_NX.log1p(), self.count_centre_X, self.count_scale_X)

    @property
    def counter(self) -> Counter | None:
        """Counts from raw histories, for `collate`; None where nothing is counted."""
        if self.counting is None:
            return None
        return Counter(plan=self.counting, cell_MQ=self.cell_MQ.cpu().numpy())


def _standardise(x_NX: torch.Tensor, centre_X: torch.Tensor, scale_X: torch.Tensor) -> None:
    """What brings the columns to a mean of 0 and a deviation of 1; one that hardly varies is not blown up."""
    centre_X.copy_(x_NX.mean(dim=0))
    deviation_X = x_NX.std(dim=0, correction=0)
    scale_X.copy_(torch.where(deviation_X > 1e-3, 1 / deviation_X, 1.0))


def _take(rows: torch.Tensor, at_BL: torch.Tensor) -> torch.Tensor:
    """rows[at_BL], as an embedding: its gradient is summed many times faster than that of indexing."""
    return functional.embedding(at_BL, rows.flatten(1)).unflatten(-1, rows.shape[1:])


def loss(logit_BC: torch.Tensor, label_BC: torch.Tensor) -> Float[torch.Tensor, ""]:
    """Mean binary cross-entropy over real candidates."""
    real = label_BC != PADDING
    return functional.binary_cross_entropy_with_logits(logit_BC[real], label_BC[real])
