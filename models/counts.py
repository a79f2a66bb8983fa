"""How often a user has met an item, and each value of its declared fields: decayed counts, in one sparse sketch.

    count(f, x, now) = sum over events i whose item has x in field f of w_i exp(-lambda (now - t_i))

Softmax attention cannot tell a repeat from a likeness; a count can. A value has a cell within the cells of its
field, by its number or its hash: a count-min sketch (Cormode & Muthukrishnan, 2005) of depth one that is so wide that a
user touches few of its cells, of which only these are kept. So the counts of a user are a cache (`models.cache`) of one
group and one head, whose codewords are cells and whose values have no width: its laws and limits are theirs, and its
merge, decay and empty are used as they are. Like those, counts are as of the reference time of the row, that of its
newest event.

Cell 0 is no cell: what an unknown item or a missing value has. It is neither counted nor found.

Shapes: N events, M items, F item fields, C candidates, Q counted fields, R decay rates of counts; X = Q * R.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import msgspec
import numpy as np
from jaxtyping import Float32, Float64, Int32, Int64, Integer, UInt16

from models import cache
from models.cache import Cache, CacheSpec, EncodedEvents
from models.count_kernels import BEYOND, NO_CELL, count_kernel, timeline_kernel

# The field that has the most values.
ITEM = "item_id"


class CountPlan(msgspec.Struct, frozen=True, kw_only=True):
    """What a checkpoint counts: item fields (item_id is one), each at these half-lives; null for "never forgets".

    known: how many values of each field the training knew; absent before it.
    """

    fields: list[str]
    half_life_ms: list[float | None]
    cells: int = BEYOND
    known: list[int] | msgspec.UnsetType = msgspec.UNSET

    def __post_init__(self) -> None:
        if not self.fields or not self.half_life_ms:
            raise ValueError("counts need a field and a half-life (null: never)")
        if not 1 + 8 * len(self.fields) <= self.cells <= BEYOND:
            raise ValueError(f"{self.cells} cells are not {1 + 8 * len(self.fields)} to {BEYOND}")
        if self.known is not msgspec.UNSET and len(self.known) != len(self.fields):
            raise ValueError(f"{len(self.known)} numbers of known values for {len(self.fields)} counted fields")

    @property
    def rate_R(self) -> Float64[np.ndarray, "R"]:
        """lambda in 1/ms, zero for "never forgets"."""
        return cache.decay_rates([self.half_life_ms])[0]

    @property
    def width(self) -> int:
        """Numbers of a candidate: X."""
        return len(self.fields) * len(self.half_life_ms)

    def spec(self, checkpoint_id: str) -> CacheSpec:
        """The counts of this checkpoint as a cache."""
        return CacheSpec(
            checkpoint_id=checkpoint_id, groups=1, codewords=self.cells, value_width=0, rate_HR=self.rate_R[None]
        )

    def cells_of(
        self, field: str, values: Sequence[str | None], row_N: Sequence[int] | np.ndarray
    ) -> UInt16[np.ndarray, "N"]:
        """The cell of each value of a field; NO_CELL for a value that is missing or empty.

        row_N: the values' embedding rows. Values that have one have cells of their own, as long as there are enough;
        those that came after the training (row 0) are hashed.
        """
        first, cells = self._range(field)
        known = zip(values, np.asarray(row_N).tolist(), strict=True)
        found = (first + (row - 1 if row else _hash(v)) % cells if v else NO_CELL for v, row in known)
        return np.fromiter(found, np.uint16, len(values))

    def _range(self, field: str) -> tuple[int, int]:
        """The first of a field's own cells, and how many.

        Were all among all cells, an item that shares one with a department would seem to be a favourite. Of several
        fields the item has seven eighths, and what the others, with two cells for each value known, do not need.
        """
        others = [name for name in self.fields if name != ITEM]
        theirs = (self.cells - 1) // 8 if ITEM in self.fields else self.cells - 1
        size = dict.fromkeys(others, theirs // max(1, len(others)))
        if ITEM in self.fields:
            if self.known is not msgspec.UNSET:
                known = dict(zip(self.fields, self.known, strict=True))
                size = {name: min(most, max(1, 2 * known[name])) for name, most in size.items()}
            size[ITEM] = self.cells - 1 - sum(size.values())
        names = list(size)
        return 1 + sum(size[name] for name in names[: names.index(field)]), size[field]


def _hash(value: str) -> int:
    return int.from_bytes(hashlib.blake2b(value.encode(), digest_size=8).digest(), "little")


@dataclass(frozen=True, kw_only=True, slots=True)
class CountedEvents:
    """Events after the item table: a cell per counted field, the time and the weight."""

    cell_NQ: UInt16[np.ndarray, "N Q"]
    time_ms_N: Int64[np.ndarray, "N"]
    weight_N: Float32[np.ndarray, "N"]

    def __len__(self) -> int:
        return len(self.time_ms_N)


def delta(spec: CacheSpec, events: CountedEvents) -> Cache:
    """The counts of these events alone, by the cache's own `delta`: the obvious twin of `fold`."""
    fields = events.cell_NQ.shape[1]
    counted = events.cell_NQ.ravel() != NO_CELL
    touched = EncodedEvents(
        code_NG=events.cell_NQ.reshape(-1, 1)[counted],
        value_NHD=np.zeros((int(counted.sum()), 1, 0), np.float32),
        time_ms_N=np.repeat(events.time_ms_N, fields)[counted],
        weight_N=np.repeat(events.weight_N, fields)[counted],
    )
    counts = cache.decay(cache.delta(spec, touched), int(events.time_ms_N.max(initial=0)))
    return replace(counts, count=len(events))


def fold(counts: Cache, events: CountedEvents) -> Cache:
    """merge(counts, delta(events)) by a compiled kernel, which merges sorted cells: O(entries + events log events)."""
    if len(events) == 0:
        return counts
    reference_ms = max(counts.reference_ms, int(events.time_ms_N.max()))
    cell_N, net_N, mass_NR = count_kernel(
        counts.code_N,
        counts.net_N,
        counts.mass_NPR[:, 0],
        reference_ms - counts.reference_ms,
        events.cell_NQ,
        reference_ms - events.time_ms_N,
        events.weight_N,
        counts.spec.rate_HR[0],
    )
    return Cache(
        spec=counts.spec,
        reference_ms=reference_ms,
        count=counts.count + len(events),
        code_N=cell_N,
        net_N=net_N,
        mass_NPR=mass_NR[:, None],
        mean_NPRD=np.empty((len(cell_N), 1, counts.spec.rates, 0), np.float32),
    )


def read(counts: Cache, cell_CQ: UInt16[np.ndarray, "C Q"], now_ms: int) -> Float32[np.ndarray, "C X"]:
    """The candidates' counts as of now: for each field, at each rate. Never negative."""
    mass_NR = np.exp(cache.log_mass(counts, now_ms)[:, 0])
    at_CQ = np.searchsorted(counts.code_N, cell_CQ)
    # One more row, of zeros, for the cells that hold nothing.
    mass_NR = np.concatenate([mass_NR, np.zeros((1, counts.spec.rates))])
    found_CQ = np.append(counts.code_N, NO_CELL)[at_CQ] == cell_CQ
    return mass_NR[np.where(found_CQ, at_CQ, -1)].reshape(len(cell_CQ), -1).astype(np.float32)


class Asked(NamedTuple):
    """Candidates at a time, who are to be counted in the first `end` events of a timeline."""

    end: int
    now_ms: int
    candidate_C: np.ndarray


@dataclass(frozen=True, kw_only=True, slots=True)
class Counter:
    """Counts from raw events, with the cells of known items (row 0, the unknown item, has none).

    Cells are those of `CountPlan.cells_of`, or any numbers: each its own, and counts are exact.
    """

    plan: CountPlan
    cell_MQ: Integer[np.ndarray, "M Q"]

    def of_timeline(
        self, item_N: np.ndarray, time_ms_N: np.ndarray, weight_N: np.ndarray, asked: Sequence[Asked]
    ) -> list[Float32[np.ndarray, "C X"]]:
        """What `read` gives of rows of these events, for all that is asked in one pass over them."""
        fields, bound_I = len(self.plan.fields), np.cumsum([0, *(len(a.candidate_C) for a in asked)])
        event_NQ = self.cell_MQ[item_N]
        asked_CQ = self.cell_MQ[np.concatenate([a.candidate_C for a in asked])]
        cells, at = np.unique(np.concatenate([event_NQ, asked_CQ]), return_inverse=True)
        at = at.reshape(-1, fields)
        count_CQR = timeline_kernel(
            at[: len(event_NQ)],
            time_ms_N.astype(np.int64, copy=False),
            weight_N.astype(np.float64),
            np.array([a.end for a in asked]),
            np.array([a.now_ms for a in asked]),
            bound_I,
            at[len(event_NQ) :],
            len(cells),
            self.plan.rate_R,
        )
        count_CQR[asked_CQ == NO_CELL] = 0.0
        return np.split(count_CQR.reshape(len(asked_CQ), -1), bound_I[1:-1])


def exact_cells(
    feature_MF: Int64[np.ndarray, "M F"], fields: Sequence[str], plan: CountPlan
) -> Int32[np.ndarray, "M Q"]:
    """A cell of its own for each value of each counted field: counts as no sketch has them.

    feature_MF are the items' values by number, 0 for none, of these fields.
    """
    value_MQ = feature_MF[:, [list(fields).index(field) for field in plan.fields]]
    start_Q = np.cumsum([0, *value_MQ.max(axis=0)[:-1]])
    return np.where(value_MQ > 0, start_Q + value_MQ, NO_CELL).astype(np.int32)
