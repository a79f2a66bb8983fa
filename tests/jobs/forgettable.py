"""A log, its letters and a store with a user who is to be forgotten, and a search of bytes beside the product's."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import redis
from deltalake import DeltaTable, write_deltalake

from feature_repo.store import Backfill, RowStore, whole_put
from jobs.read_log import ReadLog, SampledRead
from models.checkpoint import Checkpoint
from models.event import Event
from pipelines.dead_letters import DeadLetter, write_dead_letters
from pipelines.encode import EncodedBatch
from pipelines.update import update_rows
from tests.pipelines.small_log import partition_of, plain_rows, recent_of, set_properties
from tests.small import random_events

WHO = "forget-me-4f1c7e0b92"
# One who is almost the same, and whom a careless search would take.
NEARLY = f"{WHO}-too"
SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        *((name, pa.string()) for name in ("event_id", "user_id", "item_id", "action")),
        ("event_time_ms", pa.int64()),
        ("weight", pa.float64()),
        ("log_time_ms", pa.int64()),
        ("value", pa.binary()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """A log of files with letters, a store with every user's row of two checkpoints, and what a ranker read of them."""

    log: Path
    state: Path
    read_log: Path
    events: Sequence[Event]
    checkpoints: Sequence[Checkpoint]

    @property
    def users(self) -> list[str]:
        return sorted({event.user_id for event in self.events})


def some_events(count: int = 240) -> list[Event]:
    """Random ones of seven users, two of whom have the names above."""
    names = {"u0": WHO, "u1": NEARLY}
    return [
        msgspec.structs.replace(
            event, user_id=(name := names.get(event.user_id, event.user_id)), event_id=f"{name}/{event.event_id}"
        )
        for event in random_events(count)
    ]


def make_log(path: Path, events: Sequence[Event], commits: int = 3) -> Path:
    """A dense log of two partitions, as the ingest makes them."""
    table = DeltaTable.create(path / "events", SCHEMA, partition_by=["partition"])
    set_properties(table, {"vql.partitions": "2", "vql.epoch": "1"})
    size = -(-len(events) // commits)
    for start in range(0, len(events), size):
        append_events(path, events[start : start + size])
    return path


def put_events(path: Path, partition: int, events: Mapping[int, Event]) -> None:
    """One commit with these events at these offsets."""
    rows = [
        {"epoch": 1, "partition": partition, "offset": offset, "value": msgspec.json.encode(event)}
        | msgspec.structs.asdict(event)
        for offset, event in events.items()
    ]
    write_deltalake(path / "events", pa.Table.from_pylist(rows, SCHEMA), mode="append")


def append_events(path: Path, events: Sequence[Event]) -> None:
    """One commit more, at the next offsets."""
    held = DeltaTable(path / "events").to_pyarrow_table(columns=["partition", "offset"]).to_pylist()
    ends = {p: max((row["offset"] for row in held if row["partition"] == p), default=-1) for p in range(2)}
    rows = []
    for event in events:
        partition = partition_of(event)
        ends[partition] += 1
        place = {"epoch": 1, "partition": partition, "offset": ends[partition], "log_time_ms": None}
        rows.append(place | msgspec.structs.asdict(event) | {"value": msgspec.json.encode(event)})
    write_deltalake(path / "events", pa.Table.from_pylist(rows, SCHEMA), mode="append")


def add_letters(path: Path) -> None:
    """Of each of the two users: one by its key, one by its text alone, one without either."""
    letters = []
    for name in (WHO, NEARLY):
        for key, value in (
            (name.encode(), b"{}"),
            (None, b'{"uid": "%s", "broken' % name.encode()),
            (b"another", msgspec.json.encode({"user_id": name})),
        ):
            letters.append(
                DeadLetter(
                    epoch=1, partition=0, offset=len(letters), reason="json", detail=f"of {name}", key=key, value=value
                )
            )
    write_dead_letters(path / "dead_letters", letters)
    rows = [
        {"digest": f"{n:064}", "reason": "json", "detail": "d", "source": f'{{"who":"{name}"}}'}
        for n, name in enumerate((WHO, NEARLY))
    ]
    write_deltalake(path / "quarantine", pa.Table.from_pylist(rows))


def fill(rows: RowStore, checkpoint: Checkpoint, events: Sequence[Event], log: Path) -> None:
    """Every user's row, and the record of a backfill up to the log's end."""
    wanted = plain_rows(checkpoint, events)
    rows.put_rows(checkpoint.checkpoint_id, [whole_put(user_id, row) for user_id, row in wanted.items()])
    cut = {p: sum(partition_of(event) == p for event in events) - 1 for p in range(2)}
    log_id = str(DeltaTable(log / "events").metadata().id)
    record = Backfill(epoch=1, cut=cut, users=len(wanted), events=len(events), log=str(log), log_id=log_id)
    rows.record_backfill(checkpoint.checkpoint_id, record)


def fold_at(
    rows: RowStore, checkpoint: Checkpoint, events: Sequence[Event], offsets: Sequence[int], **more: Any
) -> None:
    """What a stream's worker does with events of one partition at these offsets."""
    batch = EncodedBatch(
        epoch=1,
        partition=partition_of(events[0]),
        user_ids=[event.user_id for event in events],
        recent=recent_of(checkpoint, events, offsets),
        unknown_items=0,
        unknown_actions=0,
    )
    update_rows(rows, checkpoint.fold(), batch, **more)


def add_reads(path: Path, rows: RowStore, checkpoint: Checkpoint, users: Sequence[str], key: bytes) -> None:
    """As a ranker logs them, which has read each user's row twice."""
    log = ReadLog(path, 1.0, key, flush_s=3600.0)
    for user_id, row in 2 * list(zip(users, rows.get_rows(checkpoint.checkpoint_id, users), strict=True)):
        read = SampledRead(
            checkpoint_id=checkpoint.checkpoint_id,
            history="fresh",
            row=row,
            asked_ms=0,
            item_C=np.array([1, 2]),
            scores=[0.5, 0.25],
        )
        log.put(user_id, read)
        assert log.flush()
    log.close()


def traces(folder: Path, needle: str | bytes = WHO) -> list[str]:
    """Files whose bytes, or whose Parquet columns, hold the needle and not the other one's longer name."""
    found = []
    for path in sorted(folder.rglob("*")):
        if path.is_file() and any(_bare(text, needle) for text in _texts(path)):
            found.append(str(path.relative_to(folder)))
    return found


def redis_traces(client: redis.Redis, needle: str = WHO) -> list[bytes]:
    """Keys that hold the needle, or whose serialised value does."""
    dumped = [(key, client.dump(key) or b"", client.type(key)) for key in client.scan_iter()]
    members = {key: b"\0".join(client.zrange(key, 0, -1)) for key, _, kind in dumped if kind == b"zset"}
    return [key for key, value, _ in dumped if _bare(key + b"\0" + value + b"\0" + members.get(key, b""), needle)]


def _texts(path: Path) -> Iterator[bytes]:
    yield path.read_bytes()
    if path.suffix == ".parquet":
        yield from _leaves(pq.read_table(path, partitioning=None).to_pylist())


def _leaves(value: Any) -> Iterator[bytes]:
    if isinstance(value, dict):
        for pair in value.items():
            yield from _leaves(list(pair))
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, str | bytes):
        yield value.encode() if isinstance(value, str) else value


def _bare(text: bytes, needle: str | bytes) -> bool:
    """Parquet's own minima are cut after 64 bytes, and with them the longer name; so what makes it longer is enough."""
    spelled = needle.encode() if isinstance(needle, str) else needle
    return re.search(re.escape(spelled) + b"(?!-)", text) is not None
