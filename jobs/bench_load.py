"""What the benchmarks feed the stream: a checkpoint of the default sizes with random codes, and JSON events on a topic.

The parameters are random, because what an event costs depends on sizes and not on what was learned. Users are drawn
from a power law or uniformly, items from a power law, so that rows come to hold as many codewords as real ones.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow.parquet as pq
from confluent_kafka import Producer

from models.checkpoint import ACTION_VALUES, OTHER_ACTION, Checkpoint, Manifest, Sizes, write_checkpoint
from models.errors import MachineError
from models.event import Event
from models.item_table import append_segments, segment_table
from models.wire import pack_recent

ITEMS = 20_000
ITEM_SKEW = 0.8
ACTIONS = (OTHER_ACTION, "purchase", "view")
DAY_MS = 86_400_000.0
EVENT_STEP_MS = 600_000
PRODUCE_WAIT_S, QUEUE_WAIT_S = 120.0, 0.02
Record = tuple[bytes | None, bytes | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Load:
    """Who the events are of: the k-th of `users` users has a share of them in proportion to k ** -skew."""

    name: str
    users: int
    skew: float


LOADS = {
    "skewed": Load(name="skewed", users=5_000, skew=1.0),
    "uniform": Load(name="uniform", users=500_000, skew=0.0),
}


class Traffic:
    """Events of a load, drawn without end; each has an id of its own."""

    def __init__(self, load: Load, seed: int = 0) -> None:
        self._rng = np.random.default_rng(seed)
        self.user_ids = [f"user-{n}" for n in range(load.users)]
        self._item_ids = [f"item-{n}" for n in range(1, ITEMS + 1)]
        self._user_share_U, self._item_share_M = _cumulative(load.users, load.skew), _cumulative(ITEMS, ITEM_SKEW)
        self._seed, self._drawn = seed, 0

    def draw(self, count: int, from_ms: int, step_ms: float = 0.0) -> list[Record]:
        """So many records (key, value), their events' times step_ms apart."""
        user_N = np.searchsorted(self._user_share_U, self._rng.random(count)).tolist()
        item_N = np.searchsorted(self._item_share_M, self._rng.random(count)).tolist()
        action_N = self._rng.integers(1, len(ACTIONS), count).tolist()
        encode, first = msgspec.json.encode, self._drawn
        self._drawn += count
        records: list[Record] = []
        for n, (user, item, action) in enumerate(zip(user_N, item_N, action_N, strict=True)):
            user_id = self.user_ids[user]
            event = Event(
                event_id=f"{self._seed}-{first + n}",
                user_id=user_id,
                item_id=self._item_ids[item],
                action=ACTIONS[action],
                event_time_ms=from_ms + int(n * step_ms),
            )
            records.append((user_id.encode(), encode(event)))
        return records


@lru_cache(maxsize=4)
def _cumulative(count: int, skew: float) -> np.ndarray:
    """The cumulative shares of `count` that are drawn with a power law's probabilities."""
    share = np.arange(1, count + 1, dtype=np.float64) ** -skew
    cumulative = np.cumsum(share) / share.sum()
    cumulative[-1] = 1.0
    return cumulative


def random_history(
    rng: np.random.Generator, length: int, end_ms: int, items: int = ITEMS, actions: int = len(ACTIONS)
) -> np.ndarray:
    """One user's raw events (dtype RECENT), EVENT_STEP_MS apart and the newest at end_ms, of items by a power law.

    Which of the items 1 to `items` are the user's favourites is drawn too.
    """
    rank_N = np.searchsorted(_cumulative(items, ITEM_SKEW), rng.random(length), side="right")
    return pack_recent(
        np.arange(length),
        end_ms - EVENT_STEP_MS * np.arange(length)[::-1],
        rng.integers(0, actions, length),
        1 + rng.permutation(items)[rank_N],
        np.ones(length, np.float32),
        rng.integers(0, 1 << 24, length),
    )


def produce_in_turn(producer: Producer, *arguments: Any, **options: Any) -> None:
    """`producer.produce`, once its queue has room."""
    while True:
        try:
            producer.produce(*arguments, **options)
            return
        except BufferError:
            producer.poll(QUEUE_WAIT_S)


def fill(address: str, topic: str, records: Sequence[Record]) -> None:
    """Append the records to the topic. Raises MachineError when the broker does not take them all in time."""
    producer = Producer({"bootstrap.servers": address, "linger.ms": 20, "queue.buffering.max.messages": 500_000})
    for key, value in records:
        produce_in_turn(producer, topic, value, key)
    if left := producer.flush(PRODUCE_WAIT_S):
        raise MachineError(f"the broker at {address} did not take {left:,} records in {PRODUCE_WAIT_S:g} s")


def past_ms(count: int) -> int:
    """When `count` events a millisecond apart have to begin, to have happened by now."""
    return int(time.time() * 1000) - count


def random_checkpoint(path: Path, sizes: Sizes, seed: int = 0) -> Checkpoint:
    """A checkpoint with an item table of ITEMS items, of half-lives of a day, a week, a month and never."""
    rng = np.random.default_rng(seed)
    half_lives = [[DAY_MS], [7 * DAY_MS], [28 * DAY_MS], [None]]
    item_ids = [f"item-{n}" for n in range(1, ITEMS + 1)]
    manifest = Manifest(
        model="vql",
        sizes=sizes,
        half_life_ms=[half_lives[head % len(half_lives)] for head in range(sizes.heads)],
        actions=list(ACTIONS),
        fields=["item_id"],
        training={"seed": seed},
        metrics={},
        files={},
    )
    action_values = rng.normal(size=(len(ACTIONS), sizes.heads, sizes.value_width)).astype(np.float32)
    checkpoint = write_checkpoint(path, manifest, {ACTION_VALUES: action_values}, {"item_id": item_ids})
    code_MG = rng.integers(0, sizes.codewords, (ITEMS + 1, sizes.groups))
    value_MV = rng.normal(size=(ITEMS + 1, sizes.heads * sizes.value_width))
    checkpoint.items_path.mkdir()
    segment = checkpoint.items_path / "items-00000.parquet"
    pq.write_table(segment_table(["", *item_ids], code_MG, value_MV, np.arange(ITEMS + 1)[:, None]), segment)
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [segment])
    return checkpoint
