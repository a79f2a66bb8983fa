"""What the benchmark of the reader reads: rows of users with 1,000 to 100,000 events each, in each of its layouts.

Lengths are log-uniform. A user of n events has n ** 0.75 different items, by their popularity, and comes back to them
by a power law: at 1,000 events that is about 500 of the 1,024 codewords of the default sizes, as in real logs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import redis

from feature_repo.store import Backfill, RowStore, whole_put
from jobs.bench_load import ACTIONS, ITEM_SKEW, ITEMS
from models.row import Fold, Row, advance, new_row
from models.wire import Stamp, encode_recents, pack_recent

EVENTS_MIN, EVENTS_MAX = 1_000, 100_000
ITEMS_POWER, RETURN_SKEW = 0.75, 0.8
YEAR_MS, NOW_MS = 365 * 86_400_000, 1_750_000_000_000
EPOCH, PARTITION = 1, 0
ROWS_PER_WRITE = 200


def realistic_rows(using: Fold, users: int, seed: int = 0) -> dict[str, Row]:
    """A row for each user, made by the product's own `advance`."""
    rng = np.random.default_rng(seed)
    share_M = np.arange(1, ITEMS + 1, dtype=np.float64) ** -ITEM_SKEW
    share_M /= share_M.sum()
    position = Stamp(epoch=EPOCH, partition=PARTITION, offset=-1)
    rows = {}
    for user in range(users):
        count = int(np.exp(rng.uniform(np.log(EVENTS_MIN), np.log(EVENTS_MAX))))
        own_I = 1 + rng.choice(ITEMS, int(count**ITEMS_POWER), replace=False, p=share_M)
        weight_I = np.arange(1, len(own_I) + 1, dtype=np.float64) ** -RETURN_SKEW
        cumulative_I = np.cumsum(weight_I) / weight_I.sum()
        records = pack_recent(
            np.arange(count) * users + user,
            np.sort(rng.integers(NOW_MS - YEAR_MS, NOW_MS, count)),
            rng.integers(1, len(ACTIONS), count),
            own_I[np.minimum(np.searchsorted(cumulative_I, rng.random(count)), len(own_I) - 1)],
            np.ones(count, np.float32),
            rng.integers(0, 2**24, count).astype(np.uint32),
        )
        rows[f"user-{user}"], _ = advance(new_row(using.spec, EPOCH, PARTITION), records, position, using)
    return rows


def store_rows(store: RowStore, checkpoint_id: str, rows: Mapping[str, Row]) -> None:
    """The product's own layout."""
    for users in _chunks(list(rows)):
        store.put_rows(checkpoint_id, [whole_put(user_id, rows[user_id]) for user_id in users])
    events = sum(row.count for row in rows.values())
    record = Backfill(epoch=EPOCH, cut={PARTITION: 0}, users=len(rows), events=events, log="benchmark")
    store.record_backfill(checkpoint_id, record)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """Keys of one kind on a server, by user, and the command that reads them all."""

    client: redis.Redis
    codes: int

    def store_strings(self, rows: Mapping[str, Row]) -> None:
        """The same bytes, as one string for each user: what a multi-get reads with least work."""
        for users in _chunks(list(rows)):
            self.client.mset({user_id: rows[user_id].folded_data + _recent(rows[user_id]) for user_id in users})

    def store_codewords(self, rows: Mapping[str, Row]) -> None:
        """A feature for each codeword: its net count, masses and means."""
        for user_id, row in rows.items():
            cache = row.folded
            entries = {
                str(int(code)): net.tobytes() + mass.tobytes() + mean.tobytes()
                for code, net, mass, mean in zip(
                    cache.code_N, cache.net_N, cache.mass_NPR, cache.mean_NPRD, strict=True
                )
            }
            self.client.hset(user_id, mapping=entries | {"recent": _recent(row)})

    def read_strings(self, user_ids: Sequence[str]) -> object:
        return self.client.mget(user_ids)

    def read_codewords(self, user_ids: Sequence[str]) -> object:
        """As a feature store asks: every feature by its name."""
        names = [*map(str, range(self.codes)), "recent"]
        pipeline = self.client.pipeline(transaction=False)
        for user_id in user_ids:
            pipeline.hmget(user_id, names)
        return pipeline.execute()


def _recent(row: Row) -> bytes:
    (recent,) = encode_recents(row.spec.checkpoint_id, [row.stamp], [row.recent_data])
    return recent


def _chunks(user_ids: Sequence[str]) -> list[Sequence[str]]:
    return [user_ids[start : start + ROWS_PER_WRITE] for start in range(0, len(user_ids), ROWS_PER_WRITE)]
