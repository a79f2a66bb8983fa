"""Small event logs as the ingest writes them, and the rows that a plain fold over the same events gives."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from zlib import crc32

import msgspec
import pyarrow as pa
from deltalake import DeltaTable, write_deltalake

from feature_repo.store import RowStore
from models.checkpoint import Checkpoint
from models.event import Event, columns
from models.row import Row, advance, decode_row, new_row
from models.wire import Stamp, pack_recent
from tests.twin import assert_same_cache

SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("event_id", pa.string()),
        ("user_id", pa.string()),
        ("log_time_ms", pa.int64()),
        ("value", pa.binary()),
    ]
)


def new_log(path: Path, partitions: int = 2, epoch: int = 1) -> Path:
    table = DeltaTable.create(path, SCHEMA, partition_by=["partition"])
    set_properties(table, {"vql.partitions": str(partitions), "vql.epoch": str(epoch)})
    return path


def set_properties(table: DeltaTable, properties: dict[str, str]) -> None:
    # delta-rs refuses properties that it does not know when it creates a table, but not afterwards.
    table.alter.set_table_properties(properties, raise_if_not_exists=False)


def partition_of(event: Event, partitions: int = 2) -> int:
    return crc32(event.user_id.encode()) % partitions


def by_partition(events: Sequence[Event], partitions: int = 2) -> dict[int, list[bytes]]:
    values: dict[int, list[bytes]] = {p: [] for p in range(partitions)}
    for event in events:
        values[partition_of(event, partitions)].append(msgspec.json.encode(event))
    return values


def append(path: Path, partition: int, values: Sequence[bytes | None], first_offset: int, epoch: int = 1) -> None:
    """One commit with these records at first_offset and on."""
    rows = {
        "epoch": [epoch] * len(values),
        "partition": [partition] * len(values),
        "offset": range(first_offset, first_offset + len(values)),
        "event_id": [""] * len(values),
        "user_id": [None] * len(values),
        "log_time_ms": [None] * len(values),
        "value": values,
    }
    write_deltalake(path, pa.table({k: pa.array(v, SCHEMA.field(k).type) for k, v in rows.items()}), mode="append")


def append_all(path: Path, values: dict[int, list[bytes]], commits: int = 3) -> None:
    """Several commits with everything, each holding the next share of every partition."""
    for c in range(commits):
        for partition, all_of_it in values.items():
            start, stop = c * len(all_of_it) // commits, (c + 1) * len(all_of_it) // commits
            if stop > start:
                append(path, partition, all_of_it[start:stop], start)


def plain_rows(checkpoint: Checkpoint, events: Sequence[Event], partitions: int = 2, epoch: int = 1) -> dict[str, Row]:
    """Each user's row from scratch, all events at once."""
    using, next_offset = checkpoint.fold(), dict.fromkeys(range(partitions), 0)
    mine: dict[str, tuple[list[Event], list[int]]] = {}
    for event in events:
        partition = partition_of(event, partitions)
        kept, offsets = mine.setdefault(event.user_id, ([], []))
        kept.append(event)
        offsets.append(next_offset[partition])
        next_offset[partition] += 1
    rows = {}
    for user_id, (kept, offsets) in mine.items():
        partition = partition_of(kept[0], partitions)
        row, _ = advance(
            new_row(using.spec, epoch, partition),
            recent_of(checkpoint, kept, offsets),
            Stamp(epoch=epoch, partition=partition, offset=-1),
            using,
        )
        rows[user_id] = row
    return rows


def recent_of(checkpoint: Checkpoint, events: Sequence[Event], offsets: Sequence[int]):
    """Events as the records of a row."""
    c = columns(events, offsets)
    table = checkpoint.fold().table
    return pack_recent(
        c.offset_N,
        c.time_ms_N,
        checkpoint.action_index(c.actions),
        table.lookup(c.item_ids),
        c.weight_N,
        c.event_hash_N,
    )


def read_rows(rows: RowStore, checkpoint: Checkpoint, user_ids: Sequence[str]) -> dict[str, Row]:
    """The stored rows, decoded; users without one are absent."""
    stored = rows.get_rows(checkpoint.checkpoint_id, user_ids)
    return {u: decode_row(data, checkpoint.spec) for u, data in zip(user_ids, stored, strict=True) if data is not None}


def assert_rows_equal(found: dict[str, Row], wanted: dict[str, Row]) -> None:
    """The same users, stamps, recent events and (to float rounding) folded entries."""
    assert found.keys() == wanted.keys()
    for user_id, row in wanted.items():
        mine = found[user_id]
        assert (mine.stamp, mine.folded_stamp, mine.count) == (row.stamp, row.folded_stamp, row.count), user_id
        assert mine.recent.tobytes() == row.recent.tobytes()
        assert_same_cache(mine.folded, row.folded)
