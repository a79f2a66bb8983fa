"""Examples for a training of seconds: users who prefer the items of one category."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.examples import Vocabulary
from jobs.train import item_cells
from models.checkpoint import Sizes
from models.counts import CountPlan
from models.timelines import CELLS, FEATURES, SCHEMA
from models.training import TrainPlan
from tests.small import HOUR_MS, START_MS

# From (user id, category, draws) to a row of SCHEMA.
User = Callable[[str, int, np.random.Generator], dict]
ITEMS, CATEGORIES = 40, 4
SIZES = Sizes(width=8, heads=4, groups=2, codewords=8, key_width=4, value_width=4, window=4)


def feature_table() -> np.ndarray:
    """Embedding rows (id, category) of ITEMS items and of the unknown one."""
    item = np.arange(ITEMS + 1)
    return np.stack([item, np.where(item > 0, item % CATEGORIES + 1, 0)], axis=1)


def cell_table(counts: CountPlan) -> np.ndarray:
    """What the items of feature_table are counted as, item i5 of category c2 by these names; the unknown one is not."""
    names = {"item_id": [f"i{n}" for n in range(1, ITEMS + 1)], "category": [f"c{n}" for n in range(1, CATEGORIES + 1)]}
    return item_cells("vql", counts, Vocabulary(fields=names, feature_MF=feature_table()))


def write_small_examples(folder: Path, users: int = 40, seed: int = 0, user: User | None = None) -> Path:
    """Timelines in two files, and the feature table. user makes one of these users, with a taste for a category."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    rows = [(user or _user)(f"u{u}", u % CATEGORIES, rng) for u in range(users)]
    for part, chunk in enumerate((rows[: users // 2], rows[users // 2 :])):
        pq.write_table(pa.Table.from_pylist(chunk, SCHEMA), folder / f"part-{part:05d}.parquet")
    np.save(folder / FEATURES, feature_table())
    return folder


def _user(user_id: str, taste: int, rng: np.random.Generator) -> dict:
    count = int(rng.integers(10, 30))
    liked = np.array([i for i in range(1, ITEMS + 1) if i % CATEGORIES == taste])
    other = np.array([i for i in range(1, ITEMS + 1) if i % CATEGORIES != taste])
    ends = sorted(rng.choice(np.arange(5, count), 4, replace=False).tolist())
    return {
        "user_id": user_id,
        "item": np.where(rng.random(count) < 0.9, rng.choice(liked, count), rng.choice(other, count)).tolist(),
        "action": rng.integers(0, 2, count).tolist(),
        "time_ms": (START_MS + np.arange(count) * HOUR_MS).tolist(),
        "weight": [1.0] * count,
        "now_ms": [START_MS + e * HOUR_MS for e in ends],
        "end": ends,
        "candidate": [[int(rng.choice(liked)), *rng.choice(other, 3).tolist()] for _ in ends],
        "label": [[1, 0, 0, 0] for _ in ends],
    }


def repeating_user(user_id: str, taste: int, rng: np.random.Generator) -> dict:
    """Of the items of one category the user always takes the same few, each time any of them.

    What is asked is which of them, beside others of the category: for a model of likeness they are all alike.
    """
    liked = rng.permutation([i for i in range(1, ITEMS + 1) if i % CATEGORIES == taste])
    own, strange = liked[: len(liked) // 2], liked[len(liked) // 2 :]
    row = _user(user_id, taste, rng)
    item = rng.choice(own, len(row["item"]))
    # Each of them is met before anything is asked.
    item[: len(own)] = own
    asked = [[int(rng.choice(own)), *rng.choice(strange, 3, replace=False).tolist()] for _ in row["end"]]
    return row | {"item": item.tolist(), "candidate": asked}


def small_plan(folder: Path, model: str = "vql", **changes) -> TrainPlan:
    """A plan over the small examples, which are written if need be."""
    examples = folder / "examples"
    if not examples.exists():
        write_small_examples(examples)
    settings = {
        "model": model,
        "examples": str(examples),
        "work": str(folder / f"work-{model}"),
        "sizes": SIZES,
        "half_life_ms": [[float(HOUR_MS)], [24.0 * HOUR_MS], [168.0 * HOUR_MS], [None]],
        "actions": ["other", "purchase"],
        "field_rows": [ITEMS + 1, CATEGORIES + 1],
        "epochs": 6,
        "batch": 16,
        "save_every_steps": 7,
    }
    plan = TrainPlan(**(settings | changes))
    if plan.counts is not None:
        Path(plan.work).mkdir(parents=True, exist_ok=True)
        np.save(Path(plan.work) / CELLS, cell_table(plan.counts))
    return plan
