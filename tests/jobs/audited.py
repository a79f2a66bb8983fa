"""A log of events as a topic's copy has it, the rows that it gives, and a ranker that logs all that it reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Reader
from feature_repo.store import Backfill, whole_put
from jobs.read_log import ReadLog
from jobs.scoring import Asked, load_scorer
from models.checkpoint import Checkpoint
from models.event import Event
from models.row import Row, RowBytes, advance, decode_row, new_row
from models.user_hash import key_id
from models.wire import Stamp
from tests.pipelines.small_log import partition_of, recent_of, set_properties
from tests.small import HOUR_MS, START_MS

KEY = b"a key of the tests, of 32 bytes."
CANDIDATES = ["i1", "i7", "i30", "nothing"]
ASKED_MS = START_MS + 400 * HOUR_MS
SCHEMA = pa.schema(
    [
        *((name, pa.int32()) for name in ("epoch", "partition")),
        ("offset", pa.int64()),
        *((name, pa.string()) for name in ("event_id", "user_id", "item_id", "action")),
        ("event_time_ms", pa.int64()),
        ("weight", pa.float64()),
        ("log_time_ms", pa.int64()),
        ("value", pa.binary()),
    ]
)


def key_file(folder: Path, key: bytes = KEY) -> Path:
    """A file with the key that the ranker hashes users with, or with another one."""
    path = folder / f"key-{key_id(key)}"
    path.write_bytes(key)
    return path


@dataclass(frozen=True, kw_only=True)
class AuditedShop:
    """events: by user, each with its partition and offset."""

    checkpoint: Checkpoint
    log: Path
    events: dict[str, list[tuple[Event, int, int]]]

    def row(self, user_id: str, upto: int | None = None) -> Row:
        """The user's row from scratch, all events at once; of those up to an offset, if one is given."""
        using = self.checkpoint.fold()
        mine = [each for each in self.events[user_id] if upto is None or each[2] <= upto]
        position = Stamp(epoch=1, partition=self.events[user_id][0][1], offset=-1)
        recent = recent_of(self.checkpoint, [event for event, _, _ in mine], [offset for _, _, offset in mine])
        row, _ = advance(new_row(using.spec, 1, position.partition), recent, position, using)
        return row

    def fill(self, store: StoreHandle, rows: dict[str, Row]) -> None:
        """As a backfill does."""
        opened = store.open()
        puts = [whole_put(user_id, row) for user_id, row in rows.items()]
        assert opened.put_rows(self.checkpoint.checkpoint_id, puts) == [True] * len(puts)
        record = Backfill(epoch=1, cut={0: 0}, users=len(rows), events=1, log=str(self.log))
        opened.record_backfill(self.checkpoint.checkpoint_id, record)
        opened.close()

    def stored(self, store: StoreHandle) -> dict[str, RowBytes | None]:
        opened = store.open()
        found = opened.get_rows(self.checkpoint.checkpoint_id, list(self.events))
        opened.close()
        return dict(zip(self.events, found, strict=True))

    def stored_row(self, store: StoreHandle, user_id: str) -> Row:
        data = self.stored(store)[user_id]
        assert data is not None
        return decode_row(data, self.checkpoint.spec)

    def plant(self, store: StoreHandle, user_id: str, row: Row) -> None:
        """Put a row in place of the stored one at the same position, its checksums right."""
        raised = msgspec.structs.replace(row, stamp=msgspec.structs.replace(row.stamp, revision=row.stamp.revision + 1))
        assert store.open().put_rows(self.checkpoint.checkpoint_id, [whole_put(user_id, raised)]) == [True]

    def read(self, store: StoreHandle, users: Sequence[str], path: Path) -> None:
        """As a ranker that logs each of its reads, and scores."""
        opened, log = Opened(self.checkpoint), ReadLog(path, 1.0, KEY, flush_s=3600.0)
        reader = Reader(store.open(), opened)
        scorer = replace(load_scorer(self.checkpoint, opened.loaded, reader), read_log=log)
        scorer.score([Asked(user_id=user, item_ids=CANDIDATES, now_ms=ASKED_MS) for user in users])
        log.close()
        reader.close()
        assert log.metrics.reads == {"written": len(users), "dropped": 0}


def audited_shop(checkpoint: Checkpoint, log: Path, rows: Sequence[dict], fresh: Sequence[str] = ()) -> AuditedShop:
    """A log of these events in this order. Each was appended at its event's time, but those of `fresh` users now."""
    events: dict[str, list[tuple[Event, int, int]]] = {}
    records, ends = [], [0, 0]
    for row in rows:
        event = msgspec.convert(row, Event)
        partition = partition_of(event)
        log_ms = int(time.time() * 1000) if event.user_id in fresh else event.event_time_ms
        record = {"epoch": 1, "partition": partition, "offset": ends[partition], "log_time_ms": log_ms}
        records.append(row | record | {"value": msgspec.json.encode(event)})
        events.setdefault(event.user_id, []).append((event, partition, ends[partition]))
        ends[partition] += 1
    table = DeltaTable.create(log / "events", SCHEMA, partition_by=["partition"])
    set_properties(table, {"vql.partitions": "2", "vql.epoch": "1"})
    write_deltalake(log / "events", pa.Table.from_pylist(records, SCHEMA), mode="append")
    return AuditedShop(checkpoint=checkpoint, log=log, events=events)
