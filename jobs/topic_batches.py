"""The batches of a topic: each record checked by the one contract, and written to its table once.

A batch is repeated whole after a kill, with the number it had; Delta takes a number of an application once in each
table. Knows nothing of Kafka's clients: a topic is looked at by a function that is handed in.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import structlog
from pyspark.sql import DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.event_log import forgotten_of
from models.errors import InputError
from models.event import FUTURE_MS_MAX, UNKNOWN_TIME, Records, parse_batch
from models.forgotten import ERASED, FORGOTTEN_USER, Forgotten

_RECORD = [("partition", pa.int32()), ("offset", pa.int64()), ("log_time_ms", pa.int64()), ("value", pa.binary())]
_EVENT = [
    *((name, pa.string()) for name in ("event_id", "user_id", "item_id", "action")),
    ("event_time_ms", pa.int64()),
    ("weight", pa.float64()),
]
_REJECT = [("key", pa.binary()), ("reason", pa.string()), ("detail", pa.string())]
CHECKED = pa.schema([*_RECORD, *_EVENT, *_REJECT])


class TopicIdentity(Protocol):
    """Which topic of its name it is."""

    @property
    def topic_id(self) -> str: ...

    @property
    def partitions(self) -> int: ...


class OpenedTopic(Protocol):
    """A topic as it is now: its identity, and the first and the last offset that each partition has."""

    @property
    def identity(self) -> TopicIdentity: ...

    @property
    def begins(self) -> Mapping[int, int]: ...

    @property
    def ends(self) -> Mapping[int, int]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicSource:
    """A topic to ingest. look: how it is now; options: those of Spark's reader that reach it ("kafka.*").

    A batch holds batch_records at most; the next one starts interval_s after the one before it, if not later.
    """

    name: str
    epoch: int
    look: Callable[[], OpenedTopic]
    options: Mapping[str, str]
    batch_records: int
    interval_s: float = 1.0
    future_ms_max: int = FUTURE_MS_MAX


@dataclass(frozen=True, kw_only=True, slots=True)
class TopicReport:
    """What one run took over: records = events (tombstones among them) + quarantined."""

    records: int = 0
    events: int = 0
    quarantined: int = 0
    seconds: float = 0.0


class NotBegun(Exception):  # noqa: N818 it is no error
    """A batch that was not begun, because a signal came."""


@dataclass(kw_only=True)
class BatchWriter:
    """Writes each batch to both tables, and keeps what an exception of its own was: Spark hands back text."""

    source: TopicSource
    identity: TopicIdentity
    log: Path
    checkpoint: Path
    stop: threading.Event = field(default_factory=threading.Event)
    done: TopicReport = TopicReport()
    failure: Exception | None = None

    @property
    def application(self) -> str:
        return f"vql-ingest-kafka {self.source.epoch} {self.identity.topic_id}"

    def write(self, batch: DataFrame, number: int) -> None:
        try:
            if self.stop.is_set():
                raise NotBegun
            self._write(batch, number)
        except Exception as error:
            self.failure = error
            raise

    def _write(self, batch: DataFrame, number: int) -> None:
        started_s = time.monotonic()
        checked = batch.mapInArrow(
            partial(
                _check,
                future_ms_max=self.source.future_ms_max,
                forgotten=forgotten_of(self.log),
                epoch=self.source.epoch,
            ),
            from_arrow_schema(CHECKED),
        ).persist()
        try:
            counts = checked.agg(F.count("*").alias("records"), F.count("reason").alias("bad")).collect()[0]
            # After the records were fetched: what the topic is now, it was then.
            now = self.source.look()
            self._refuse_another(now.identity)
            epoch = F.lit(self.source.epoch).cast("int").alias("epoch")
            if counts["bad"]:
                bad = checked.where("reason IS NOT NULL").select(epoch, *(name for name, _ in [*_RECORD, *_REJECT]))
                self._append(bad, self.log / "quarantine", number)
            if counts["records"] > counts["bad"]:
                good = checked.where("reason IS NULL").select(epoch, *(name for name, _ in [*_RECORD, *_EVENT]))
                self._append(good, self.log / "events", number)
        finally:
            checked.unpersist()
        self.done = TopicReport(
            records=self.done.records + counts["records"],
            events=self.done.events + counts["records"] - counts["bad"],
            quarantined=self.done.quarantined + counts["bad"],
        )
        rate = round(counts["records"] / (time.monotonic() - started_s))
        lag = self._lag(now, number)
        structlog.get_logger().info("ingest", batch=number, records=counts["records"], records_per_s=rate, lag=lag)

    def _append(self, rows: DataFrame, table: Path, number: int) -> None:
        writer = rows.write.format("delta").mode("append").option("mergeSchema", True)
        writer.option("txnAppId", self.application).option("txnVersion", number).save(str(table))

    def _refuse_another(self, found: TopicIdentity) -> None:
        if (found.topic_id, found.partitions) != (self.identity.topic_id, self.identity.partitions):
            raise InputError(
                f"topic {self.source.name} was created again or re-partitioned while it was read: it has id "
                f"{found.topic_id} and {found.partitions} partitions, the log that of {self.identity.topic_id} and "
                f"{self.identity.partitions}; ingest it with --epoch {self.source.epoch + 1} and backfill"
            )

    def _lag(self, now: OpenedTopic, number: int) -> int:
        """Offsets of the topic beyond this batch, by Spark's own plan of it."""
        done = planned_ends(self.checkpoint, number, self.source.name)
        return sum(max(0, end + 1 - done.get(partition, 0)) for partition, end in now.ends.items())


def planned_ends(checkpoint: Path, number: int, topic: str) -> dict[int, int]:
    """The offset after the last one of a batch, by partition: Spark's own plan, written before it reads a batch."""
    plan = (checkpoint / "offsets" / str(number)).read_text().splitlines()[-1]
    return {int(partition): offset for partition, offset in json.loads(plan)[topic].items()}


def _check(
    batches: Iterator[pa.RecordBatch], future_ms_max: int, forgotten: Forgotten, epoch: int
) -> Iterator[pa.RecordBatch]:
    """Each record checked by the one contract, models.event: a batch of events, then one of rejects.

    A forgotten user's records up to the request become rejects without their bytes, tombstones places without a user.
    """
    for batch in batches:
        # Partitions are mixed here, so the place in the batch stands for the offset.
        records = Records(
            epoch=0,
            partition=0,
            offset_N=np.arange(batch.num_rows),
            log_time_ms_N=batch["log_time_ms"].fill_null(UNKNOWN_TIME).to_numpy(),
            keys=batch["key"].to_pylist(),
            values=batch["value"].to_pylist(),
        )
        good, rejects = parse_batch(records, future_ms_max)
        taken = batch.take(pa.array(good.offset_N))
        erases = pc.is_null(taken["value"])
        told = {
            "event_id": good.event_ids,
            "item_id": good.item_ids,
            "action": good.actions,
            "event_time_ms": good.time_ms_N,
            "weight": good.weight_N.astype(np.float64),
        }
        told = {name: pc.if_else(erases, None, pa.array(column)) for name, column in told.items()}
        users = pa.array(good.user_ids, pa.string())
        if forgotten:
            gone_N = forgotten.covered_N(
                good.user_ids, epoch, taken["partition"].to_numpy(), taken["offset"].to_numpy()
            )
            users = pc.if_else(pa.array(gone_N), None, users)
            kept = pc.or_(erases, pa.array(~gone_N))
            yield _blanked(taken.filter(pc.invert(kept)))
            taken, users = taken.filter(kept), users.filter(kept)
            told = {name: column.filter(kept) for name, column in told.items()}
        yield _checked(taken, user_id=users, **told)
        if rejects:
            taken = batch.take(pa.array([reject.offset for reject in rejects]))
            reasons, details = [reject.reason for reject in rejects], [reject.detail for reject in rejects]
            bad = _checked(taken, key=taken["key"], reason=reasons, detail=details)
            places = zip(*(taken[name].to_pylist() for name in ("key", "value", "partition", "offset")), strict=True)
            gone = pa.array([forgotten.covers(key, value, (epoch, *at)) for key, value, *at in places], pa.bool_())
            yield _blanked(taken.filter(gone))
            yield bad.filter(pc.invert(gone))


def _blanked(records: pa.RecordBatch) -> pa.RecordBatch:
    """Their places, and nothing that was in them."""
    count = records.num_rows
    blank = pa.nulls(count, pa.binary())
    return _checked(records, value=blank, reason=[FORGOTTEN_USER] * count, detail=[ERASED] * count)


def _checked(records: pa.RecordBatch, **columns: object) -> pa.RecordBatch:
    """A batch of CHECKED: the records' own columns, these, and nulls for the rest."""
    known = {name: records[name] for name, _ in _RECORD} | columns
    arrays = [pa.array(known.get(f.name, [None] * records.num_rows), f.type) for f in CHECKED]
    return pa.record_batch(arrays, schema=CHECKED)
