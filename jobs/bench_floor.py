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
from pathlib import Path
from zlib import crc32

import msgspec
import numpy as np
import redis
from confluent_kafka import Consumer, Message, TopicPartition

from models.cache import Cache, empty, fold
from models.checkpoint import Checkpoint, open_checkpoint
from models.event import Event
from models.wire import RECENT, Stamp, encode_folded, encode_recent, pack_recent

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
    """busy_s: from the first record at hand to the last put. Bytes: put as two parts, and had each row been whole."""

    events: int
    busy_s: float
    busy_cpu_s: float
    rows_written: int
    two_part_bytes: int
    whole_bytes: int


@dataclass(slots=True)
class User:
    """A row in memory: the newest events as bytes, the folded part decoded and encoded."""

    recent: bytes
    cache: Cache
    folded: bytes


def row_keys(user_id: str) -> tuple[str, str]:
    """The keys of the folded and the recent part of a row."""
    return f"f:{user_id}", f"r:{user_id}"


class Floor:
    """The rows, and what was written of them."""

    def __init__(self, checkpoint: Checkpoint, server: redis.Redis) -> None:
        self._using, self._server = checkpoint.fold(), server
        self._action = {action: n for n, action in enumerate(checkpoint.manifest.actions)}.get
        self._item = self._using.table.index.get
        self._decode = msgspec.json.Decoder(Event).decode
        self._users: dict[str, User] = {}
        self.events = self.rows_written = self.two_part_bytes = self.whole_bytes = 0

    def take(self, messages: list[Message]) -> None:
        """Fold the records of one partition into the rows, and write what changed."""
        events = [self._decode(message.value()) for message in messages]
        offsets = [message.offset() for message in messages]
        records = pack_recent(
            np.array(offsets),
            np.array([event.event_time_ms for event in events]),
            np.array([self._action(event.action, 0) for event in events]),
            np.array([self._item(event.item_id, 0) for event in events]),
            np.array([event.weight for event in events], np.float32),
            np.array([crc32(event.event_id.encode()) for event in events], np.uint32),
        )
        places: dict[str, list[int]] = {}
        for n, event in enumerate(events):
            places.setdefault(event.user_id, []).append(n)
        data = records[[n for mine in places.values() for n in mine]].tobytes()
        partition, start, changed = messages[0].partition(), 0, {}
        for user_id, mine in places.items():
            end = start + RECENT.itemsize * len(mine)
            stamp = Stamp(epoch=EPOCH, partition=partition, offset=offsets[mine[-1]])
            self._append(user_id, data[start:end], stamp, changed)
            start = end
        self._server.mset(changed)
        self.events += len(events)
        self.rows_written += len(places)

    def _append(self, user_id: str, data: bytes, stamp: Stamp, changed: dict[str, bytes]) -> None:
        """Add a user's new records to the row, and what is to be written of it to `changed`."""
        folded_key, recent_key = row_keys(user_id)
        user = self._users.get(user_id)
        if user is None:
            cache = empty(self._using.spec)
            folded = encode_folded(cache, Stamp(epoch=EPOCH, partition=stamp.partition, offset=-1))
            user = self._users[user_id] = User(recent=b"", cache=cache, folded=folded)
            changed[folded_key] = folded
        recent = np.frombuffer(user.recent + data, RECENT)
        window = self._using.window
        if len(recent) >= 2 * window:
            ripe = recent[: (len(recent) // window - 1) * window]
            recent = recent[len(ripe) :]
            user.cache = fold(user.cache, self._using.encode(ripe))
            at = Stamp(epoch=EPOCH, partition=stamp.partition, offset=int(ripe["position"][-1]) >> 16)
            user.folded = changed[folded_key] = encode_folded(user.cache, at)
        user.recent = recent.tobytes()
        row = changed[recent_key] = encode_recent(self._using.spec.checkpoint_id, stamp, recent)
        self.whole_bytes += len(row) + len(user.folded)
        self.two_part_bytes += len(row) + len(changed.get(folded_key, b""))


def run(job: FloorJob) -> FloorDone:
    """Read the topic's partitions in turns, a batch at a time, until `events` are in the rows."""
    server = redis.Redis.from_url(job.redis_url)
    floor = Floor(open_checkpoint(Path(job.checkpoint)), server)
    consumers = []
    for partition in range(job.partitions):
        consumers.append(Consumer({"bootstrap.servers": job.kafka} | READ_OPTIONS))
        consumers[-1].assign([TopicPartition(job.topic, partition, 0)])
    started_s = put_s = started_cpu_s = 0.0
    deadline_s = time.monotonic() + IDLE_S
    while floor.events < job.events and time.monotonic() < deadline_s:
        for consumer in consumers:
            if messages := consumer.consume(job.batch, 0):
                if floor.events == 0:
                    started_s, started_cpu_s = time.monotonic(), time.process_time()
                floor.take(messages)
                put_s = time.monotonic()
                deadline_s = put_s + IDLE_S
    return FloorDone(
        events=floor.events,
        busy_s=put_s - started_s,
        busy_cpu_s=time.process_time() - started_cpu_s,
        rows_written=floor.rows_written,
        two_part_bytes=floor.two_part_bytes,
        whole_bytes=floor.whole_bytes,
    )


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(run(msgspec.json.decode(sys.argv[1], type=FloorJob))))
