"""The floor under the stream's cost: the same rows by a plain loop, without Beam, fence, restarts or dead letters.

Consume, decode, group by user, append to rows that are held in this process's memory, fold every W events, and write
what changed to Redis in one command a batch. It does what has to be done for a row and nothing to be safe: no row is
read back, nothing is checked, and a process that dies has lost its rows. Its rows are the stream's, to the rounding of
float32.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np
import pyarrow as pa
import redis
from confluent_kafka import Consumer, Message, TopicPartition

from models.cache import Cache, empty, fold
from models.checkpoint import Checkpoint, open_checkpoint
from models.event import Event
from models.wire import RECENT, Stamp, encode_folded, encode_recents, pack_recent

READ_OPTIONS = {"group.id": "vql-bench-floor", "enable.auto.commit": False, "auto.offset.reset": "earliest"}
EPOCH = 1
IDLE_S = 20.0


class FloorJob(msgspec.Struct, frozen=True, kw_only=True):
    """What to read and where to write it."""

    kafka: str
    topic: str
    partitions: int
    events: int
    redis_url: str
    checkpoint: str
    batch: int


class FloorDone(msgspec.Struct, frozen=True, kw_only=True):
    """busy_s, busy_cpu_s: from the first record at hand to the last put, by the clock and of this process's CPU."""

    events: int
    busy_s: float
    busy_cpu_s: float


@dataclass(slots=True)
class User:
    """A row in memory: the newest events as bytes, the folded part decoded."""

    recent: bytes
    cache: Cache


def folded_key(user_id: str) -> str:
    return f"f:{user_id}"


def recent_key(user_id: str) -> str:
    return f"r:{user_id}"


class Floor:
    """The rows."""

    def __init__(self, checkpoint: Checkpoint, server: redis.Redis) -> None:
        self._using, self._server = checkpoint.fold(), server
        self._action = {action: n for n, action in enumerate(checkpoint.manifest.actions)}.get
        self._item = self._using.table.index.get
        self._decode = msgspec.json.Decoder(Event).decode
        self._users: dict[str, User] = {}
        self._nobody = empty(self._using.spec)
        self._nothing_folded = lru_cache(
            lambda partition: encode_folded(self._nobody, Stamp(epoch=EPOCH, partition=partition, offset=-1))
        )
        self.events = 0

    def take(self, messages: list[Message]) -> None:
        """Fold these records into the rows, and write what changed."""
        events = [self._decode(message.value()) for message in messages]
        offset_N = np.array([message.offset() for message in messages])
        records = pack_recent(
            offset_N,
            np.array([event.event_time_ms for event in events]),
            np.array([self._action(event.action, 0) for event in events]),
            np.array([self._item(event.item_id, 0) for event in events]),
            np.array([event.weight for event in events], np.float32),
            np.array([crc32(event.event_id.encode()) for event in events], np.uint32),
        )
        users = pa.array([event.user_id for event in events], pa.string()).dictionary_encode()
        code_N = users.indices.to_numpy()
        order_N, user_ids = np.argsort(code_N, kind="stable"), users.dictionary.to_pylist()
        data, ends = records[order_N].tobytes(), np.cumsum(np.bincount(code_N)).tolist()
        changed: dict[str, bytes] = {}
        stamps, recents, start = [], [], 0
        for user_id, end in zip(user_ids, ends, strict=True):
            last = messages[order_N[end - 1]]
            stamps.append(Stamp(epoch=EPOCH, partition=last.partition(), offset=last.offset()))
            new = data[start * RECENT.itemsize : end * RECENT.itemsize]
            recents.append(self._append(user_id, new, stamps[-1].partition, changed))
            start = end
        encoded = encode_recents(self._using.spec.checkpoint_id, stamps, recents)
        changed.update(zip(map(recent_key, user_ids), encoded, strict=True))
        self._server.mset(changed)
        self.events += len(events)

    def _append(self, user_id: str, new: bytes, partition: int, changed: dict[str, bytes]) -> bytes:
        """The user's recent records with the new ones; what is folded of them goes to `changed`."""
        user = self._users.get(user_id)
        if user is None:
            user = self._users[user_id] = User(recent=b"", cache=self._nobody)
            changed[folded_key(user_id)] = self._nothing_folded(partition)
        user.recent += new
        window = self._using.window
        if (count := len(user.recent) // RECENT.itemsize) >= 2 * window:
            ripe = np.frombuffer(user.recent, RECENT, (count // window - 1) * window)
            user.recent = user.recent[ripe.nbytes :]
            user.cache = fold(user.cache, self._using.encode(ripe))
            at = Stamp(epoch=EPOCH, partition=partition, offset=int(ripe["position"][-1]) >> 16)
            changed[folded_key(user_id)] = encode_folded(user.cache, at)
        return user.recent


def run(job: FloorJob) -> FloorDone:
    """Read the topic, a batch at a time, until `events` are in the rows or none come any more."""
    floor = Floor(open_checkpoint(Path(job.checkpoint)), redis.Redis.from_url(job.redis_url))
    consumer = Consumer({"bootstrap.servers": job.kafka} | READ_OPTIONS)
    consumer.assign([TopicPartition(job.topic, partition, 0) for partition in range(job.partitions)])
    started_s = put_s = started_cpu_s = 0.0
    while floor.events < job.events:
        messages = consumer.consume(1, IDLE_S)
        messages += consumer.consume(job.batch - 1, 0)
        if not messages:
            break
        if floor.events == 0:
            started_s, started_cpu_s = time.monotonic(), time.process_time()
        floor.take(messages)
        put_s = time.monotonic()
    return FloorDone(events=floor.events, busy_s=put_s - started_s, busy_cpu_s=time.process_time() - started_cpu_s)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(run(msgspec.json.decode(sys.argv[1], type=FloorJob))))
