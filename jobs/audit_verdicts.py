"""What an audit says of each read: it agrees with the log, does not, or cannot be compared, and how old it was.

A read agrees if the row that it found is the one that the log gives as of the row's own stamp (`row_difference`), and
its scores are those of that row. What is not in the log yet, or of another epoch, is not compared.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch
from pyspark.sql import Column, DataFrame
from pyspark.sql import functions as F
from pyspark.sql.pandas.types import from_arrow_schema

from jobs.audit_reads import COLUMNS
from jobs.audited_log import AuditedLog
from jobs.row_difference import (
    AGREES,
    COUNTS,
    DAMAGED,
    ENTRIES,
    FOLDED,
    FOREIGN,
    LATER_ITEMS,
    RECENT,
    STAMP,
    Difference,
    difference,
)
from models.checkpoint import Checkpoint, open_checkpoint
from models.dense_caches import dense_caches
from models.load import load_ranker_of
from models.row import Fold, RowBytes
from models.served import ServedRanker

SCORES, MISSING, EXTRA = "scores", "missing", "extra"
AHEAD, OTHER_EPOCH, LATE = "ahead", "other_epoch", "late"
GOOD = (AGREES, LATER_ITEMS)
BAD = (STAMP, FOLDED, RECENT, ENTRIES, COUNTS, SCORES, DAMAGED, FOREIGN, MISSING, EXTRA)
NOT_COMPARED = (AHEAD, OTHER_EPOCH, LATE)
VERDICT = pa.schema(
    [
        ("user_id", pa.string()),
        *((name, pa.int64()) for name in ("read_ms", "partition", "offset", "revision")),
        ("verdict", pa.string()),
        ("error", pa.float64()),
        ("score_error", pa.float64()),
    ]
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Tolerance:
    """error: of a row's numbers (`row_difference`). score: of a logit. grace_ms: from the log to a user's first row."""

    error: float = 1e-4
    score: float = 1e-3
    grace_ms: int = 60_000


def judged(reads: DataFrame, log: AuditedLog, checkpoint: Checkpoint, tolerance: Tolerance) -> DataFrame:
    """A verdict (VERDICT) for each read (`audit_reads.USER_READ`) whose events were not erased since."""
    ahead = F.col("offset") > F.coalesce(_ends(log)[F.col("partition")], F.lit(-1))
    there = F.col("recent").isNotNull()
    sorted_out = log.after_requests(reads).withColumn(
        "verdict",
        F.when(~there & (F.col("history") != "absent"), LATE)
        .when(~there, F.when(F.col("user_id").isNull(), AGREES).otherwise(MISSING))
        .when(F.col("epoch").isNull(), DAMAGED)
        .when(F.col("epoch") != log.facts.epoch, OTHER_EPOCH)
        .when(ahead, AHEAD)
        .when(F.col("user_id").isNull(), EXTRA),
    )
    at_once = _not_missing(sorted_out.where("verdict IS NOT NULL"), log, tolerance)
    compared = _compared(sorted_out.where("verdict IS NULL"), log, checkpoint, tolerance)
    numbers = [F.lit(None).cast("double").alias(name) for name in ("error", "score_error")]
    return at_once.select(*VERDICT.names[:-2], *numbers).unionByName(compared)


def aged(verdicts: DataFrame, log: AuditedLog) -> DataFrame:
    """The verdicts, and how stale each row was.

    stale_ms: since when the log has had the oldest event that was not in the row when it was read; stale_event_ms: by
    that event's own time; 0 where there was none.
    """
    read = verdicts.where(f"offset IS NOT NULL AND verdict NOT IN {NOT_COMPARED}")
    read = read.select("user_id", "read_ms", F.col("offset").alias("upto")).distinct()
    moves = log.moves(read.select("user_id").distinct())
    after = moves.join(read, "user_id").where("offset > upto AND log_ms <= read_ms")
    oldest = after.groupBy("user_id", "read_ms", F.col("upto").alias("offset")).agg(
        F.max(F.col("read_ms") - F.col("log_ms")).alias("stale_ms"),
        F.max(F.col("read_ms") - F.col("event_time_ms")).alias("stale_event_ms"),
    )
    return verdicts.join(oldest, ["user_id", "read_ms", "offset"], "left").fillna(0, ["stale_ms", "stale_event_ms"])


def _ends(log: AuditedLog) -> Column:
    return F.create_map(*(F.lit(x).cast("long") for pair in log.ends.items() for x in pair))


def _not_missing(reads: DataFrame, log: AuditedLog, tolerance: Tolerance) -> DataFrame:
    """Users without a row are missing if the log had an event of theirs that stands, some time before the read."""
    new = F.coalesce(F.col("first_ms") > F.col("read_ms") - tolerance.grace_ms, F.lit(True))
    verdict = F.when((F.col("verdict") == MISSING) & new, AGREES).otherwise(F.col("verdict"))
    first = log.first_standing(reads.where(F.col("verdict") == MISSING).select("user_id").distinct())
    return reads.join(first, "user_id", "left").withColumn("verdict", verdict)


def _compared(reads: DataFrame, log: AuditedLog, checkpoint: Checkpoint, tolerance: Tolerance) -> DataFrame:
    rows = log.rows_at(reads.select("user_id", "offset").distinct(), checkpoint)
    rows = rows.withColumnsRenamed({"folded": "wanted_folded", "recent": "wanted_recent"})
    joined = reads.select(COLUMNS).join(rows, ["user_id", "offset"], "left")
    return joined.mapInArrow(_comparer(checkpoint.path, tolerance), from_arrow_schema(VERDICT))


def _comparer(path: Path, tolerance: Tolerance) -> Callable[[Iterator[pa.RecordBatch]], Iterator[pa.RecordBatch]]:
    def compare_task(batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        comparer = _Comparer(open_checkpoint(path), tolerance)
        for batch in batches:
            yield pa.RecordBatch.from_pylist([comparer.verdict(read) for read in batch.to_pylist()], VERDICT)

    return compare_task


class _Comparer:
    """Compares reads with the rows that the log gives, in one task."""

    def __init__(self, checkpoint: Checkpoint, tolerance: Tolerance) -> None:
        self._checkpoint, self._tolerance = checkpoint, tolerance
        self._using = checkpoint.fold()
        self._served: ServedRanker | None = None

    def verdict(self, read: dict) -> dict[str, object]:
        found = self._difference(read)
        what, score_error = found.what, None
        if read["score"] is not None and read["wanted_folded"] is not None and not read["later_items"]:
            score_error = self._score_error(read)
            if what == AGREES and score_error > self._tolerance.score:
                what = SCORES
        names = ("user_id", "read_ms", "partition", "offset", "revision")
        numbers = {"error": found.error, "score_error": score_error}
        return {name: read[name] for name in names} | {"verdict": what} | numbers

    def _difference(self, read: dict) -> Difference:
        if read["wanted_folded"] is None:
            # The log has records of the user, but none up to this stamp: the user had none yet, or was forgotten.
            return Difference(EXTRA)
        found = RowBytes(folded=read["folded"] or b"", recent=read["recent"])
        return difference(found, _wanted(read), self._using, self._tolerance.error, later_items=read["later_items"])

    def _score_error(self, read: dict) -> float:
        """The largest error of the scores that were made of the read, from those of the row that the log gives."""
        if self._served is None:
            torch.set_num_threads(1)
            self._served = _served(self._checkpoint, self._using)
        cpu = torch.device("cpu")
        caches = dense_caches([_wanted(read)], self._using, cpu).caches
        item_1C = torch.tensor([read["item"]])
        with torch.inference_mode():
            logit_1C = self._served.from_cache(item_1C, caches, torch.tensor([read["asked_ms"]]))
        error_C = np.abs(logit_1C[0].numpy() - np.array(read["score"]))
        return float(np.nan_to_num(error_C, nan=np.inf).max(initial=0.0))


def _wanted(read: dict) -> RowBytes:
    return RowBytes(folded=read["wanted_folded"], recent=read["wanted_recent"])


def _served(checkpoint: Checkpoint, using: Fold) -> ServedRanker:
    return ServedRanker(load_ranker_of(checkpoint, using.table))
