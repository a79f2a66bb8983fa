"""`vql audit`: whether what rankers read, and will read next, is what the log of events says.

Every row is a function of the log and of its own stamp. So it is made anew, by the fold of the backfill, as of the very
stamp of the row that was read, and the two are compared: no newer state with an older one, and no difference that a
running stream would explain. Reads are those that rankers logged (`jobs.read_log`); rows are also read from the store,
for a sample of the log's users, another one each day. What differs can be published anew (`jobs.repair`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F
from pyspark.storagelevel import StorageLevel

from feature_repo.handle import StoreHandle
from jobs.audit_reads import COLUMNS, LoggedReads, logged_reads, stored_reads
from jobs.audit_report import AuditReport, summary
from jobs.audit_verdicts import BAD, Tolerance, aged, judged
from jobs.audited_log import AuditedLog
from jobs.event_log import read_records
from jobs.repair import Repaired, repair
from jobs.spark import errors_of_workers
from models.checkpoint import Checkpoint
from models.errors import InputError

DAY_MS = 86_400_000
READS, STORE = "reads", "store"
# A batch of ten thousand rows, which is Spark's own measure, would be half a gigabyte.
_BATCH = "spark.sql.execution.arrow.maxBytesPerBatch"
BATCH_BYTES = 32 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditPlan:
    """What to audit: logged reads, if any, and the rows of store_users users, whom the day of now_ms decides."""

    reads: LoggedReads | None
    store_users: int
    now_ms: int
    tolerance: Tolerance = field(default_factory=Tolerance)
    repair: bool = False


def audit(spark: SparkSession, checkpoint: Checkpoint, log: Path, store: StoreHandle, plan: AuditPlan) -> AuditReport:
    """Compare, and repair where the plan says so.

    Raises InputError for a log or a read log that is not there, or when there is no read to audit; StoreError as the
    store does.
    """
    if plan.reads is None and not plan.store_users:
        raise InputError("nothing to audit: name a read log (--read-log), or users of the store (--store-sample)")
    with errors_of_workers(), _small_batches(spark), ExitStack() as kept:
        job = _Job(spark=spark, checkpoint=checkpoint, log=log, store=store, plan=plan, kept=kept)
        sources: dict[str, DataFrame] = {}
        if plan.store_users:
            sources[STORE] = job.stored(_sampled_users(job))
        # What is read before the log is opened is seldom ahead of it.
        audited = AuditedLog.open(spark, log)
        if plan.reads is not None:
            sources[READS] = job.keep(_logged(job, audited, plan.reads))
        found = {name: job.verdicts(reads, audited) for name, reads in sources.items()}
        repaired = _repaired(job, found) if plan.repair else None
    return AuditReport(
        checkpoint_id=checkpoint.checkpoint_id,
        log=str(log),
        log_version=audited.version,
        sources={name: summary(verdicts) for name, verdicts in found.items()},
        repaired=repaired,
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Job:
    """An audit on its way. kept: what is to be given back at its end."""

    spark: SparkSession
    checkpoint: Checkpoint
    log: Path
    store: StoreHandle
    plan: AuditPlan
    kept: ExitStack

    def keep(self, rows: DataFrame) -> DataFrame:
        """Evaluated now, and only once: what is read from the store anew could be another."""
        rows = rows.persist(StorageLevel.DISK_ONLY)
        self.kept.callback(rows.unpersist)
        rows.count()
        return rows

    def stored(self, users: DataFrame) -> DataFrame:
        """These users' rows as the store holds them now."""
        return self.keep(stored_reads(users, self.store, self.checkpoint.checkpoint_id))

    def verdicts(self, reads: DataFrame, audited: AuditedLog) -> pa.Table:
        """What `audit_verdicts` says of them."""
        return aged(self.keep(judged(reads, audited, self.checkpoint, self.plan.tolerance)), audited).toArrow()


def _logged(job: _Job, audited: AuditedLog, part: LoggedReads) -> DataFrame:
    """The logged reads with their users' ids, which only the log of events has."""
    reads = logged_reads(job.spark, part, job.checkpoint.checkpoint_id)
    return reads.join(audited.hashed_users(part.key_file), "user_hash", "left").select(COLUMNS)


def _sampled_users(job: _Job) -> DataFrame:
    """Users of the log by a hash of the id and the day, so that all have a turn."""
    users = read_records(job.spark, job.log).where("user_id IS NOT NULL").select("user_id").distinct()
    drawn = F.xxhash64("user_id", F.lit(job.plan.now_ms // DAY_MS))
    return users.orderBy(drawn, "user_id").limit(job.plan.store_users)


def _repaired(job: _Job, found: Mapping[str, pa.Table]) -> Repaired:
    """Rows that were read may be others by now: of the users found, those are repaired whose rows are wrong now."""
    users = sorted({user_id for verdicts in found.values() for user_id in _bad_users(verdicts)})
    if not users:
        return Repaired()
    reads = job.stored(_frame(job.spark, users))
    audited = AuditedLog.open(job.spark, job.log)
    now = job.verdicts(reads, audited)
    wrong = sorted(set(_bad_users(now)))
    if not wrong:
        return Repaired()
    # As the store has them: of a damaged row nothing can be read.
    stamps = job.store.open().get_stamps(job.checkpoint.checkpoint_id, wrong)
    revision_max = max((stamp.revision for stamp in stamps if stamp is not None), default=0)
    return repair(audited, _frame(job.spark, wrong), job.checkpoint, job.store, revision_max)


def _bad_users(verdicts: pa.Table) -> list[str]:
    bad = verdicts.filter(pc.is_in(verdicts["verdict"], pa.array(BAD)))
    return bad["user_id"].drop_null().to_pylist()


def _frame(spark: SparkSession, users: list[str]) -> DataFrame:
    return spark.createDataFrame([(user_id,) for user_id in users], "user_id string")


@contextmanager
def _small_batches(spark: SparkSession) -> Iterator[None]:
    before = spark.conf.get(_BATCH)
    spark.conf.set(_BATCH, BATCH_BYTES)
    try:
        yield
    finally:
        spark.conf.set(_BATCH, before)
