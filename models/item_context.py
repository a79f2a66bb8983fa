"""Item features beside the categorical fields: numbers, tags and precomputed vectors, as the item encoder takes them.

    number   the row of one of at most BUCKETS ranges, each with as many items of the training; row 0: no number
    tags     the rows of an item's first tags, as many as an item of the training has, at most TAGS_MAX; 0 fills up
    vector   its numbers, kept beside the rows; NaN: no vector

Ranges, tags and widths are those of the training's items, and in its checkpoint: whatever comes later is encoded by
them. What cannot be used is taken for absent, and counted.

Shapes: N items, C columns of rows (numbers, then tags), P numbers of all vectors together.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int64

from models.errors import InputError

BUCKETS = 32
TAGS_MAX = 16
TAG_BETWEEN = "|"

Index = Mapping[str, Mapping[str, int]]


class ContextFields(msgspec.Struct, frozen=True, kw_only=True):
    """The columns of the items table that are declared as numbers, tags and vectors."""

    numbers: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.numbers, *self.tags, *self.vectors)


class Tags(msgspec.Struct, frozen=True, kw_only=True):
    """How many tags a checkpoint knows, and how many of an item it looks at."""

    known: int
    most: int


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint's features beside its fields: where each number's ranges begin but the first, tags, widths."""

    numbers: dict[str, list[float]] = {}
    tags: dict[str, Tags] = {}
    vectors: dict[str, int] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.numbers, *self.tags, *self.vectors)

    @property
    def number_rows(self) -> list[int]:
        """Embedding rows of each number."""
        return [len(boundaries) + 2 for boundaries in self.numbers.values()]

    @property
    def columns(self) -> int:
        """C: columns of the feature table after those of the fields."""
        return len(self.numbers) + sum(tags.most for tags in self.tags.values())

    @property
    def vector_width(self) -> int:
        """P."""
        return sum(self.vectors.values())


@dataclass(frozen=True, kw_only=True, slots=True)
class ItemContext:
    """The context of some items, and by the name of a feature how often something of it was left out."""

    row_NC: Int64[np.ndarray, "N C"]
    vector_NP: Float32[np.ndarray, "N P"]
    left_out: dict[str, int]


def fit_context(items: pa.Table, fields: ContextFields) -> tuple[Context, dict[str, list[str]]]:
    """The context of a training with these items (item_id and the declared columns), and the tags by row.

    Raises InputError for a feature that no item has, and as `context_of`.
    """
    numbers = {name: _boundaries(name, _numbers(items[name])[0]) for name in fields.numbers}
    kept = {name: [tags[:TAGS_MAX] for tags in _tags(items[name])] for name in fields.tags}
    values = {name: sorted({tag for tags in lists for tag in tags}) for name, lists in kept.items()}
    for name in fields.tags:
        if not values[name]:
            raise InputError(f"no item has a tag of {name!r}; vql ingest-items --column {name}=EXPRESSION makes them")
    return (
        Context(
            numbers=numbers,
            tags={name: Tags(known=len(values[name]), most=max(map(len, lists))) for name, lists in kept.items()},
            vectors={name: _width(name, _lists(name, items[name])) for name in fields.vectors},
        ),
        values,
    )


def tag_index(tags: Mapping[str, Sequence[str]]) -> Index:
    """The embedding row of each tag, from the tags by row."""
    return {name: {tag: i + 1 for i, tag in enumerate(values)} for name, values in tags.items()}


def context_of(items: pa.Table, context: Context, index: Index) -> ItemContext:
    """These items (item_id and the context's columns) as a checkpoint with this context encodes them.

    Raises InputError for a vector of another width, and for a column that holds no lists of numbers.
    """
    left_out: dict[str, int] = {}
    columns, vectors = [], []
    for name, boundaries in context.numbers.items():
        value_N, left_out[name] = _numbers(items[name])
        columns.append(_bucket_rows(value_N, boundaries)[:, None])
    for name, tags in context.tags.items():
        row_NT, left_out[name] = _tag_rows(_tags(items[name]), index[name], tags.most)
        columns.append(row_NT)
    for name, width in context.vectors.items():
        value_NP, left_out[name] = _vectors(name, items, width)
        vectors.append(value_NP)
    return ItemContext(
        row_NC=np.concatenate([np.empty((len(items), 0), np.int64), *columns], axis=1),
        vector_NP=np.concatenate([np.empty((len(items), 0), np.float32), *vectors], axis=1),
        left_out=left_out,
    )


def told(context: Context, left_out: Mapping[str, int]) -> str:
    """What was left out, for people; empty when nothing was."""
    why = dict.fromkeys(context.numbers, "numbers of {} that are none, or not finite")
    why |= {name: f"tags of {{}} beyond the first {tags.most} of an item" for name, tags in context.tags.items()}
    why |= dict.fromkeys(context.vectors, "vectors of {} that are not finite")
    return ", ".join(f"{left_out[name]:,} {why[name].format(name)}" for name in why if left_out.get(name))


def _boundaries(name: str, value_N: np.ndarray) -> list[float]:
    """Where the ranges begin, but the first: at numbers of the items, so that each range has some of them."""
    value_N = value_N[~np.isnan(value_N)]
    if not len(value_N):
        raise InputError(f"no item has a number {name!r}; vql ingest-items --column {name}=EXPRESSION makes them")
    at = np.unique(np.quantile(value_N, np.arange(1, BUCKETS) / BUCKETS, method="inverted_cdf"))
    return at[at > value_N.min()].tolist()


def _bucket_rows(value_N: np.ndarray, boundaries: Sequence[float]) -> np.ndarray:
    row_N = 1 + np.searchsorted(np.asarray(boundaries), value_N, side="right")
    return np.where(np.isnan(value_N), 0, row_N)


def _numbers(column: pa.ChunkedArray) -> tuple[np.ndarray, int]:
    """Float64, NaN where there is none; and how many there are that are no finite number."""
    cells = column.to_pylist()
    value_N = np.array([_number(cell) for cell in cells], np.float64)
    there = sum(cell is not None and str(cell).strip() != "" for cell in cells)
    return value_N, there - int((~np.isnan(value_N)).sum())


def _number(cell: object) -> float:
    try:
        value = float(str(cell))
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _tags(column: pa.ChunkedArray) -> list[list[str]]:
    """Each item's tags in their order, each once: of a text with TAG_BETWEEN between them, or of a list."""
    return [_distinct(cell) for cell in column.to_pylist()]


def _distinct(cell: object) -> list[str]:
    tags: Iterable[object] = cell if isinstance(cell, list) else str(cell or "").split(TAG_BETWEEN)
    stripped = (str(tag).strip() for tag in tags if tag is not None)
    return list(dict.fromkeys(tag for tag in stripped if tag))


def _tag_rows(lists: Sequence[Sequence[str]], index: Mapping[str, int], most: int) -> tuple[np.ndarray, int]:
    """Rows of known tags, and how many known ones did not fit. Tags that no training has met say nothing yet."""
    row_NT, cut = np.zeros((len(lists), most), np.int64), 0
    for n, tags in enumerate(lists):
        known = [row for row in map(index.get, tags) if row is not None]
        row_NT[n, : len(known)] = known[:most]
        cut += max(0, len(known) - most)
    return row_NT, cut


def _lists(name: str, column: pa.ChunkedArray) -> pa.ListArray:
    """The vectors as one array. Raises InputError for a column of something else."""
    array = column.combine_chunks()
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if not (pa.types.is_list(array.type) and _is_number(array.type.value_type)):
        raise InputError(
            f"the items' {name!r} are {array.type}, not lists of numbers; make them with vql ingest-items --column "
            f"\"{name}=from_json(EXPRESSION, 'array<float>')\""
        )
    return array


def _is_number(type_: pa.DataType) -> bool:
    return pa.types.is_floating(type_) or pa.types.is_integer(type_)


def _width(name: str, lists: pa.ListArray) -> int:
    """The width of the first vector there is; that all others have it, `context_of` looks."""
    widths = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    if not widths.any():
        raise InputError(f"no item has a vector {name!r}; vql ingest-items --column {name}=EXPRESSION makes them")
    return int(widths[widths > 0][0])


def _vectors(name: str, items: pa.Table, width: int) -> tuple[np.ndarray, int]:
    """Float32, NaN where an item has none; and how many have a number that is not finite. Empty ones are absent."""
    lists = _lists(name, items[name])
    width_N = lists.value_lengths().fill_null(0).to_numpy(zero_copy_only=False)
    if len(odd := np.flatnonzero((width_N != width) & (width_N > 0))):
        raise InputError(
            f"the vector {name!r} of item {items['item_id'][int(odd[0])].as_py()!r} has {width_N[odd[0]]} numbers, "
            f"others have {width} ({len(odd)} such items); ingest items whose vectors are all of one kind"
        )
    value_NP = np.full((len(items), width), np.nan, np.float32)
    with np.errstate(over="ignore"):
        flat = lists.flatten().to_numpy(zero_copy_only=False).astype(np.float32)
    value_NP[width_N > 0] = flat.reshape(-1, width)
    bad_N = (width_N > 0) & ~np.isfinite(value_NP).all(axis=1)
    value_NP[bad_N] = np.nan
    return value_NP, int(bad_N.sum())
