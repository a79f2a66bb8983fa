"""Training examples on disk: one Parquet row per user, with the timeline and the impressions on it.

    user_id: string
    item, action: list<int32>   time_ms: list<int64>   weight: list<float>     the user's events, oldest first
    now_ms: list<int64>         end: list<int32>                               one per impression
    candidate: list<list<int32>>   label: list<list<int8>>

An impression sees events[:end], the events strictly before it. Items are rows of the checkpoint's feature table.
Batches are of impressions, each with a history of its own, or of timelines, whose impressions share one. Their order
depends only on (files, seed, epoch), so a resumed training continues where it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import InputError
from models.request import Impression, Timeline

User = TypeVar("User")
# A pass over a timeline is shared by an impression for so many events.
EVENTS_PER_IMPRESSION = 1_024
# Beside the Parquet files: the feature table (numpy, M x F) and, if items have vectors, these (M x P). In the work
# folder: what items are counted as (M x Q).
FEATURES, VECTORS, CELLS = "features.npy", "vectors.npy", "cells.npy"
SCHEMA = pa.schema(
    [
        ("user_id", pa.string()),
        ("item", pa.list_(pa.int32())),
        ("action", pa.list_(pa.int32())),
        ("time_ms", pa.list_(pa.int64())),
        ("weight", pa.list_(pa.float32())),
        ("now_ms", pa.list_(pa.int64())),
        ("end", pa.list_(pa.int32())),
        ("candidate", pa.list_(pa.list_(pa.int32()))),
        ("label", pa.list_(pa.list_(pa.int8()))),
    ]
)


def timeline_files(folder: Path) -> list[Path]:
    """The example files in order. Raises InputError when there are none."""
    files = sorted(folder.glob("*.parquet"))
    if not files:
        raise InputError(f"{folder} holds no examples; was the log empty before the cut?")
    return files


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """At most so many impressions in a batch of timelines, and so many events unless a single timeline has more."""

    impressions: int
    events: int


def timelines_of(file: Path) -> list[Timeline]:
    """A file's users who have impressions."""
    timelines = []
    for row in pq.read_table(file, schema=SCHEMA).to_batches():
        columns = {name: row.column(name) for name in SCHEMA.names}
        timelines += [_of_user(columns, u) for u in range(row.num_rows) if len(columns["end"][u])]
    return timelines


def impressions_of(file: Path) -> list[Impression]:
    """Every impression of a file's users; those of one user share the timeline's arrays."""
    return [impression for timeline in timelines_of(file) for impression in timeline.impressions()]


def drawn_events(files: Sequence[Path], count: int, seed: int = 0) -> Impression:
    """About so many events as impressions of the first files saw them, as the history of one impression at 0 ms.

    Each impression gives as many, drawn with replacement; the candidates are those of all of them, shuffled.
    """
    rng = np.random.default_rng(seed)
    impressions: list[Impression] = []
    for file in files:
        impressions += impressions_of(file)
        if len(impressions) >= count:
            break
    each = -(-count // len(impressions))
    drawn = [(one, rng.integers(0, len(one.item_L), each)) for one in impressions]

    def column(name: str) -> np.ndarray:
        return np.concatenate([getattr(one, name)[at] for one, at in drawn])

    candidate_C = rng.permutation(np.concatenate([one.candidate_C for one in impressions]))
    return Impression(
        user_id="",
        now_ms=0,
        candidate_C=candidate_C,
        label_C=np.zeros(len(candidate_C)),
        item_L=column("item_L"),
        action_L=column("action_L"),
        time_ms_L=np.concatenate([one.time_ms_L[at] - one.now_ms for one, at in drawn]),
        weight_L=column("weight_L"),
    )


def count_impressions(files: Sequence[Path]) -> int:
    """Impressions in all files, without their candidates."""
    return sum(len(pq.read_table(f, columns=["end"])["end"].combine_chunks().flatten()) for f in files)


def batches(files: Sequence[Path], size: int, *, seed: int, epoch: int) -> Iterator[list[Impression]]:
    """Batches of impressions, shuffled between and within files; one file is in memory at a time."""
    rng = np.random.default_rng([seed, epoch])
    kept: list[Impression] = []
    for f in rng.permutation(len(files)):
        impressions = impressions_of(files[f])
        kept += [impressions[i] for i in rng.permutation(len(impressions))]
        while len(kept) >= size:
            yield kept[:size]
            kept = kept[size:]
    if kept:
        yield kept


def timeline_batches(files: Sequence[Path], limits: Limits, *, seed: int, epoch: int) -> Iterator[list[Timeline]]:
    """Batches of timelines, each with a few of its impressions, shuffled as impressions are.

    Impressions of one user are alike: a batch of few users with many of them trains worse. Passes over long timelines
    are shared by more impressions, so that none costs more than EVENTS_PER_IMPRESSION events as long as there are any.
    """
    for batch in _filled(_shuffled(files, _timelines_and_ends, limits, seed, epoch), limits):
        yield [timeline.part(first, until) for timeline, first, until, _ in batch]


def count_timeline_batches(files: Sequence[Path], limits: Limits, *, seed: int, epochs: int) -> int:
    """How many batches the epochs have, from the impressions' ends alone."""
    parts = (_shuffled(files, _ends_alone, limits, seed, epoch) for epoch in range(epochs))
    return sum(1 for epoch in parts for _ in _filled(epoch, limits))


def _shuffled(
    files: Sequence[Path], load: Callable[[Path], list[tuple[User, np.ndarray]]], limits: Limits, seed: int, epoch: int
) -> Iterator[tuple[User, int, int, int]]:
    """(user, first impression, last impression + 1, events of the pass); one file is in memory at a time."""
    rng = np.random.default_rng([seed, epoch])
    for f in rng.permutation(len(files)):
        parts = [(user, *part) for user, end_I in load(files[f]) for part in _parts(end_I, limits.impressions)]
        yield from (parts[p] for p in rng.permutation(len(parts)))


def _parts(end_I: np.ndarray, most: int) -> Iterator[tuple[int, int, int]]:
    """A timeline's impressions by the passes that they share."""
    share = min(most, max(1, -(-int(end_I.max()) // EVENTS_PER_IMPRESSION)))
    for first in range(0, len(end_I), share):
        until = min(first + share, len(end_I))
        yield first, until, int(end_I[first:until].max())


def _filled(parts: Iterator[tuple[User, int, int, int]], limits: Limits) -> Iterator[list[tuple[User, int, int, int]]]:
    """Batches of parts, within the limits."""
    kept: list[tuple[User, int, int, int]] = []
    impressions = events = 0
    for part in parts:
        _, first, until, more = part
        if kept and (impressions + until - first > limits.impressions or events + more > limits.events):
            yield kept
            kept, impressions, events = [], 0, 0
        kept.append(part)
        impressions += until - first
        events += more
    if kept:
        yield kept


def _timelines_and_ends(file: Path) -> list[tuple[Timeline, np.ndarray]]:
    return [(timeline, timeline.end_I) for timeline in timelines_of(file)]


def _ends_alone(file: Path) -> list[tuple[None, np.ndarray]]:
    column = pq.read_table(file, columns=["end"])["end"].combine_chunks()
    bound = column.offsets.to_numpy()
    ends = column.values.to_numpy()
    return [(None, ends[a:b]) for a, b in pairwise(bound.tolist()) if b > a]


def _of_user(columns: dict[str, pa.Array], u: int) -> Timeline:
    of = {name: columns[name][u].values for name in SCHEMA.names if name != "user_id"}
    return Timeline(
        user_id=columns["user_id"][u].as_py(),
        item_L=of["item"].to_numpy(),
        action_L=of["action"].to_numpy(),
        time_ms_L=of["time_ms"].to_numpy(),
        weight_L=of["weight"].to_numpy(),
        now_ms_I=of["now_ms"].to_numpy(),
        end_I=of["end"].to_numpy(),
        candidates=[candidate.values.to_numpy() for candidate in of["candidate"]],
        labels=[label.values.to_numpy() for label in of["label"]],
    )
