"""A real log: who changed which file of seventeen repositories, and its records on a Kafka topic.

An event's time is the author's, its record's time is the committer's, in whose order the records lie: months may be
between the two, which is real lateness, and clocks that ran ahead make real dead letters. Ids, actions and weights
are those of `vql data prepare gitlog`. A test that wants the data is skipped where it is not (tests.shared_data).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from zlib import crc32

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from confluent_kafka import Producer

from jobs.bench_load import produce_in_turn
from jobs.datasets.gitlog import ACTIONS, EVENTS_FILE, ITEMS_FILE
from models.checkpoint import ACTION_VALUES, OTHER_ACTION, Checkpoint, Manifest, Sizes, write_checkpoint
from tests.kafka_broker import START_WAIT_S, Broker
from tests.shared_data import shared_file
from tests.small import HOUR_MS, write_items

EVENTS = 1_000_000
PARTITIONS = 3
# The one that renames is one that the checkpoint does not know.
KNOWN_ACTIONS = [OTHER_ACTION, "added", "deleted", "modified"]
# An item of fifty is not in the table.
UNKNOWN_EVERY = 50
FUTURE_MS_MAX = 600_000
DAY_MS = 24.0 * HOUR_MS


@dataclass(frozen=True, kw_only=True, slots=True)
class GitLog:
    """Records in the order in which they arrived, by column, each with its place on the topic.

    Shapes: N records. user_N and item_N are the data's own numbers, which stand in the ids; commit and item are unique.
    """

    user_N: np.ndarray
    item_N: np.ndarray
    commit_N: np.ndarray
    action_N: np.ndarray
    time_ms_N: np.ndarray
    log_time_ms_N: np.ndarray
    weight_N: np.ndarray
    partition_N: np.ndarray
    offset_N: np.ndarray

    def __len__(self) -> int:
        return len(self.user_N)

    @property
    def bad_N(self) -> np.ndarray:
        """Records that are no events: their author's clock was more than ten minutes ahead of their committer's."""
        return self.time_ms_N > self.log_time_ms_N + FUTURE_MS_MAX

    @property
    def bad_positions(self) -> list[tuple[int, int, int]]:
        """Epoch, partition and offset of each dead letter that is to be."""
        places = zip(self.partition_N[self.bad_N].tolist(), self.offset_N[self.bad_N].tolist(), strict=True)
        return sorted((1, partition, offset) for partition, offset in places)

    def first(self, count: int) -> GitLog:
        """The first so many records; on a topic of their own they have the same places."""
        return GitLog(**{name: getattr(self, name)[:count] for name in GitLog.__dataclass_fields__})

    def event_ids(self) -> list[str]:
        return [f"c{commit}-{item}" for commit, item in zip(self.commit_N.tolist(), self.item_N.tolist(), strict=True)]


def read_gitlog(count: int = EVENTS) -> GitLog:
    """The first `count` records to arrive. Skips the test where the data is not there."""
    table = pq.read_table(shared_file(EVENTS_FILE))
    order_N = np.argsort(table["arrival_ts"].to_numpy(), kind="stable")[:count]
    column = {name: table[name].to_numpy()[order_N] for name in table.column_names}
    user_N = column["user_id"].astype(np.int64)
    by_user = np.array([crc32(b"u%d" % user) % PARTITIONS for user in range(int(user_N.max()) + 1)])
    partition_N = by_user[user_N]
    offset_N = np.empty(count, np.int64)
    for partition in range(PARTITIONS):
        mine_N = partition_N == partition
        offset_N[mine_N] = np.arange(mine_N.sum())
    return GitLog(
        user_N=user_N,
        item_N=column["item_id"].astype(np.int64),
        commit_N=column["commit_id"].astype(np.int64),
        action_N=np.array(ACTIONS)[column["action"]],
        time_ms_N=column["ts"].astype(np.int64),
        log_time_ms_N=column["arrival_ts"].astype(np.int64),
        # A commit that touches many files says less about each.
        weight_N=1.0 / column["commit_files"],
        partition_N=partition_N,
        offset_N=offset_N,
    )


def produce(broker: Broker, name: str, log: GitLog) -> str:
    """A topic with these records, each at its place; the topic's name."""
    topic = broker.create_topic(name, PARTITIONS)
    batches = {
        "linger.ms": 50,
        "log_level": 3,
        "batch.num.messages": 10_000,
        "batch.size": 900_000,
        "compression.type": "lz4",
    }
    # Idempotence keeps a partition's records in the order in which they were produced, whatever is sent again.
    producer = Producer({"bootstrap.servers": broker.address, "enable.idempotence": True} | batches)
    columns = (log.user_N, log.item_N, log.action_N, log.time_ms_N, log.log_time_ms_N, log.weight_N, log.partition_N)
    rows = zip(log.event_ids(), *(column.tolist() for column in columns), strict=True)
    for event_id, user, item, action, time_ms, log_time_ms, weight, partition in rows:
        value = (
            f'{{"event_id":"{event_id}","user_id":"u{user}","item_id":"i{item}","action":"{action}",'
            f'"event_time_ms":{time_ms},"weight":{weight!r}}}'
        )
        produce_in_turn(producer, topic, value, f"u{user}", partition, timestamp=log_time_ms)
    assert producer.flush(START_WAIT_S) == 0, f"topic {topic} did not take all records"
    return topic


def untrained_checkpoint(path: Path) -> Checkpoint:
    """The product's default sizes and window, random parameters, and a table of all items but every fiftieth."""
    sizes, rng = Sizes(), np.random.default_rng(0)
    checkpoint = write_checkpoint(
        path,
        Manifest(
            model="vql",
            sizes=sizes,
            half_life_ms=[[DAY_MS], [7 * DAY_MS], [28 * DAY_MS], [None]],
            actions=KNOWN_ACTIONS,
            fields=["item_id"],
            training={},
            metrics={},
            files={},
        ),
        {ACTION_VALUES: rng.normal(size=(len(KNOWN_ACTIONS), sizes.heads, sizes.value_width)).astype(np.float32)},
        {"item_id": []},
    )
    items: pa.ChunkedArray = pq.read_table(shared_file(ITEMS_FILE), columns=["item_id"])["item_id"]
    known = [f"i{item}" for item in items.to_pylist() if item % UNKNOWN_EVERY]
    write_items(checkpoint, ["", *known], "items-00000.parquet")
    return checkpoint
