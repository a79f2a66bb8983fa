"""A small real checkpoint with its item table, and random events for it: what most tests need."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from models.checkpoint import ACTION_VALUES, OTHER_ACTION, Checkpoint, Manifest, Sizes, write_checkpoint
from models.counts import CountPlan
from models.event import Event
from models.item_table import append_segments, segment_table

HOUR_MS = 3_600_000
START_MS = 1_600_000_000_000
ITEMS = 50
ACTIONS = [OTHER_ACTION, "purchase", "view"]


COUNTS = CountPlan(fields=["item_id"], half_life_ms=[float(HOUR_MS), None])


def small_checkpoint(
    path: Path, *, window: int = 4, newest: int = 0, seed: int = 0, rates: int = 1, counts: CountPlan | None = None
) -> Checkpoint:
    """A checkpoint of 4 heads in 2 groups of 8 codewords, with a table of the unknown item and ITEMS items.

    counts: what it counts, of item_id alone.
    """
    sizes = Sizes(width=8, heads=4, groups=2, codewords=8, key_width=4, value_width=3, window=window, newest=newest)
    half_lives: list[list[float | None]] = [
        [float(HOUR_MS) * 2**r for r in range(rates)],
        [24.0 * HOUR_MS * 2**r for r in range(rates)],
        [168.0 * HOUR_MS * 2**r for r in range(rates)],
        [None] + [1000.0 * HOUR_MS * 2**r for r in range(1, rates)],
    ]
    rng = np.random.default_rng(seed)
    checkpoint = write_checkpoint(
        path,
        Manifest(
            model="vql",
            sizes=sizes,
            half_life_ms=half_lives,
            actions=ACTIONS,
            fields=["item_id"],
            training={"seed": seed},
            metrics={},
            files={},
            counts=counts,
        ),
        {ACTION_VALUES: rng.normal(size=(len(ACTIONS), 4, 3)).astype(np.float32)},
        {"item_id": [f"i{n}" for n in range(1, ITEMS + 1)]},
    )
    write_items(checkpoint, ["", *(f"i{n}" for n in range(1, ITEMS + 1))], "items-00000.parquet", seed)
    return checkpoint


def write_items(checkpoint: Checkpoint, item_ids: list[str], name: str, seed: int = 0) -> None:
    """One segment of the item table with random codes and values."""
    rng, sizes = np.random.default_rng(seed), checkpoint.manifest.sizes
    code_MG = rng.integers(0, sizes.codewords, (len(item_ids), sizes.groups))
    value_MV = rng.normal(size=(len(item_ids), sizes.heads * sizes.value_width))
    checkpoint.items_path.mkdir(exist_ok=True)
    counts = checkpoint.manifest.counts
    cell_MQ = None if counts is None else counts.cells_of("item_id", item_ids, range(len(item_ids)))[:, None]
    table = segment_table(item_ids, code_MG, value_MV, np.arange(len(item_ids))[:, None], cell_MQ)
    pq.write_table(table, checkpoint.items_path / name)
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [checkpoint.items_path / name])


def random_events(count: int, *, users: int = 7, seed: int = 0, unknown_share: float = 0.05) -> list[Event]:
    """Events with skewed users, late times and a few unknown items and actions; no retractions."""
    rng = np.random.default_rng(seed)
    user_N = (users * rng.random(count) ** 2).astype(int)
    item_N = rng.integers(1, ITEMS + 1, count)
    time_N = START_MS + np.arange(count) * 60_000 - rng.integers(0, 10 * HOUR_MS, count) * (rng.random(count) < 0.3)
    action_N = rng.choice(["purchase", "view", "shout"], count)
    unknown_N = rng.random(count) < unknown_share
    return [
        Event(
            event_id=f"e{n}",
            user_id=f"u{user_N[n]}",
            item_id=f"new{item_N[n]}" if unknown_N[n] else f"i{item_N[n]}",
            action=str(action_N[n]),
            event_time_ms=int(time_N[n]),
            weight=float(np.float32(rng.uniform(0.5, 2.0))),
        )
        for n in range(count)
    ]
