"""Training examples on disk: one Parquet row per user, with the timeline and the impressions on it.

    user_id: string
    item, action: list<int32>   time_ms: list<int64>   weight: list<float>     the user's events, oldest first
    now_ms: list<int64>         end: list<int32>                               one per impression
    candidate: list<list<int32>>   label: list<list<int8>>

An impression sees events[:end], the events strictly before it. Items are rows of the checkpoint's feature table.
The order of batches depends only on (files, seed, epoch), so a resumed training continues where it was.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from models.errors import InputError
from models.request import Impression

# Beside the Parquet files: the feature table (numpy, M x F). In the work folder: what items are counted as (M x Q).
FEATURES, CELLS = "features.npy", "cells.npy"
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


def impressions_of(file: Path) -> list[Impression]:
    """Every impression of a file's users; those of one user share the timeline's arrays."""
    impressions: list[Impression] = []
    for row in pq.read_table(file, schema=SCHEMA).to_batches():
        columns = {name: row.column(name) for name in SCHEMA.names}
        for u in range(row.num_rows):
            impressions += _of_user(columns, u)
    return impressions


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


def _of_user(columns: dict[str, pa.Array], u: int) -> list[Impression]:
    timeline = {name: columns[name][u].values.to_numpy() for name in ("item", "action", "time_ms", "weight")}
    return [
        Impression(
            user_id=columns["user_id"][u].as_py(),
            now_ms=columns["now_ms"][u][i].as_py(),
            candidate_C=columns["candidate"][u][i].values.to_numpy(),
            label_C=columns["label"][u][i].values.to_numpy(),
            item_L=timeline["item"][:end],
            action_L=timeline["action"][:end],
            time_ms_L=timeline["time_ms"][:end],
            weight_L=timeline["weight"][:end],
        )
        for i, end in enumerate(columns["end"][u].as_py())
    ]
