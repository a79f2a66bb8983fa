"""What rankers have read, a sampled share of it, for an audit to compare with the log of events.

A read is in the log with the row's own bytes, and with the candidates and scores where it was scored. Digests of them
would be smaller, but can only say that something differs: folds that were cut otherwise round otherwise, so an audit
has to see the numbers. The share keeps the log small.

Sampled are users for a minute, by a keyed hash of both: all rankers sample the same reads, so what several of them gave
one user within a minute can be compared. By the user alone, most users would never be audited, for as long as the key
is the same; so each has a turn. User ids are not in the log, only their keyed hashes.

Off the path of requests: a read that was chosen is handed to a thread, which appends what has come every half minute as
one commit to a Delta table, by day. What waits is bounded, and what is dropped is counted. A process that dies loses
what it had not appended yet.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from hashlib import blake2b
from pathlib import Path

import numpy as np
import pyarrow as pa
import structlog
from deltalake import DeltaTable, write_deltalake
from deltalake.exceptions import TableNotFoundError
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, Metric

from models.errors import WireError
from models.row import RowBytes
from models.user_hash import hashed_user, key_id
from models.wire import RECENT_MAGIC, Stamp, read_header

BUCKET_MS = 60_000
FLUSH_S = 30.0
WAITING_BYTES_MAX = 64 << 20
ENTRIES_AT_ONCE = 16
WRITTEN, DROPPED = "written", "dropped"
# A read: when, what it found, and the scores that were made of it. So an audit has reads of the store too.
READ = (
    ("read_ms", pa.int64()),
    ("history", pa.string()),
    ("epoch", pa.int64()),
    ("partition", pa.int64()),
    ("offset", pa.int64()),
    ("revision", pa.int64()),
    ("folded", pa.binary()),
    ("recent", pa.binary()),
    ("asked_ms", pa.int64()),
    ("item", pa.list_(pa.int64())),
    ("score", pa.list_(pa.float32())),
)
SCHEMA = pa.schema(
    [
        ("day", pa.string()),
        ("user_hash", pa.binary()),
        ("key_id", pa.string()),
        ("checkpoint_id", pa.string()),
        *READ,
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledRead:
    """One user's read: what the user's cache was (`Read.outcome`), made from which row, None where there was none.

    item_C, scores: indices of the candidates in the item table and their logits as of asked_ms; scores None where they
    say nothing of the row alone.
    """

    checkpoint_id: str
    history: str
    row: RowBytes | None
    asked_ms: int
    item_C: np.ndarray
    scores: Sequence[float] | None

    @property
    def size_bytes(self) -> int:
        """What it takes in memory, nearly."""
        scores = 0 if self.scores is None else 32 * len(self.scores)
        return 512 + (0 if self.row is None else self.row.size_bytes) + self.item_C.nbytes + scores


class ReadLogMetrics:
    """Sampled reads by what became of them, for Prometheus."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self.reads: Counter[str] = Counter({WRITTEN: 0, DROPPED: 0})
        self.failed_writes = 0
        self.registry.register(self)

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        reads = CounterMetricFamily(
            "vql_read_log_reads", "Sampled reads, written or dropped because too much waited.", labels=["outcome"]
        )
        for outcome, count in self.reads.items():
            reads.add_metric([outcome], count)
        yield reads
        yield CounterMetricFamily(
            "vql_read_log_failed_writes", "Tries to append to the read log that failed.", self.failed_writes
        )

    describe = collect


class ReadLog:
    """Samples reads and appends them to the table at `path`, which may be shared. Safe to share between threads.

    share: of all pairs of a user and a minute. waiting_bytes_max: of what is not appended yet.
    """

    def __init__(
        self,
        path: Path,
        share: float,
        key: bytes,
        *,
        metrics: ReadLogMetrics | None = None,
        flush_s: float = FLUSH_S,
        waiting_bytes_max: int = WAITING_BYTES_MAX,
        clock: Callable[[], float] = time.time,
    ) -> None:
        assert 0 < share <= 1, share
        self.path, self.metrics = path, ReadLogMetrics() if metrics is None else metrics
        self._below, self._key, self._key_id, self._clock = int(share * 2**64), key, key_id(key), clock
        self._flush_s, self._bytes_max = flush_s, waiting_bytes_max
        self._bucket = (-1, blake2b())
        self._waiting: list[tuple[int, bytes, SampledRead]] = []
        self._waiting_bytes = 0
        self._turn, self._flushing = threading.Lock(), threading.Lock()
        self._due, self._ended = threading.Event(), False
        self._failing = False
        self._thread = threading.Thread(target=self._run, name="vql-read-log", daemon=True)
        self._thread.start()

    def chosen(self, user_ids: Sequence[str]) -> list[int]:
        """The places of the users whose reads are sampled now."""
        number, seeded = self._bucket
        bucket = int(self._clock() * 1000) // BUCKET_MS
        if bucket != number:
            seeded = blake2b(bucket.to_bytes(8, "little"), key=self._key, digest_size=8, person=b"vql read sample")
            self._bucket = (bucket, seeded)
        places = []
        for b, user_id in enumerate(user_ids):
            drawn = seeded.copy()
            drawn.update(user_id.encode())
            if int.from_bytes(drawn.digest(), "little") < self._below:
                places.append(b)
        return places

    def put(self, user_id: str, read: SampledRead) -> None:
        """Have this read appended, unless too much waits already."""
        entry = (int(self._clock() * 1000), hashed_user(user_id, self._key), read)
        with self._turn:
            if self._ended or self._waiting_bytes + read.size_bytes > self._bytes_max:
                self.metrics.reads[DROPPED] += 1
                return
            self._waiting.append(entry)
            self._waiting_bytes += read.size_bytes
            much = 2 * self._waiting_bytes > self._bytes_max
        if much and not self._failing:
            self._due.set()

    def flush(self) -> bool:
        """Append what waits, now; False where that failed, and it waits on."""
        with self._flushing:
            with self._turn:
                entries = list(self._waiting)
            if not entries:
                return True
            try:
                _append(self.path, _table(entries, self._key_id))
            except Exception as error:
                # Whatever it is, requests go on, and the thread that writes does too.
                self.metrics.failed_writes += 1
                if not self._failing:
                    structlog.get_logger().warning(
                        "the read log cannot be written", path=str(self.path), error=str(error)
                    )
                self._failing = True
                return False
            with self._turn:
                del self._waiting[: len(entries)]
                self._waiting_bytes -= sum(read.size_bytes for _, _, read in entries)
                self.metrics.reads[WRITTEN] += len(entries)
            self._failing = False
            return True

    def close(self) -> None:
        """Append what waits, once, and take no more."""
        self._ended = True
        self._due.set()
        self._thread.join()
        if not self.flush():
            with self._turn:
                self.metrics.reads[DROPPED] += len(self._waiting)
                self._waiting.clear()

    def _run(self) -> None:
        while not self._ended:
            self._due.wait(self._flush_s)
            self._due.clear()
            if not self._ended:
                self.flush()


def forget_before(path: Path, day: str) -> None:
    """Delete the reads of days before this one (as 2026-11-26), and make few files of many.

    Delta keeps the files of older versions for a week, then they are gone from the disk.
    """
    table = DeltaTable(path)
    table.delete(f"day < '{day}'")
    table.optimize.compact()
    table.vacuum(dry_run=False)


def _table(entries: Sequence[tuple[int, bytes, SampledRead]], key: str) -> pa.Table:
    # In parts, because Arrow keeps the interpreter for itself while it makes columns, and requests wait.
    parts = [entries[start : start + ENTRIES_AT_ONCE] for start in range(0, len(entries), ENTRIES_AT_ONCE)]
    columns = ([_columns(*entry) | {"key_id": key} for entry in part] for part in parts)
    return pa.concat_tables([pa.Table.from_pylist(rows, SCHEMA) for rows in columns])


def day_of(time_ms: int) -> str:
    """As the log has it."""
    return datetime.fromtimestamp(time_ms / 1000, UTC).strftime("%Y-%m-%d")


def stamp_of(part: bytes, magic: bytes) -> Stamp | None:
    """The stamp of a part of a row; None where it is damaged."""
    try:
        return read_header(part, magic).stamp
    except WireError:
        return None


def _columns(read_ms: int, user_hash: bytes, read: SampledRead) -> dict[str, object]:
    row = read.row
    stamp = row and stamp_of(row.recent, RECENT_MAGIC)
    return {
        "day": day_of(read_ms),
        "read_ms": read_ms,
        "user_hash": user_hash,
        "checkpoint_id": read.checkpoint_id,
        "history": read.history,
        "epoch": stamp and stamp.epoch,
        "partition": stamp and stamp.partition,
        "offset": stamp and stamp.offset,
        "revision": stamp and stamp.revision,
        "folded": row and row.folded,
        "recent": row and row.recent,
        "asked_ms": read.asked_ms,
        "item": None if read.scores is None else read.item_C,
        "score": read.scores,
    }


def _append(path: Path, rows: pa.Table) -> None:
    try:
        table = DeltaTable(path)
    except TableNotFoundError:
        table = DeltaTable.create(path, SCHEMA, mode="ignore", partition_by=["day"])
    write_deltalake(table, rows, mode="append")
