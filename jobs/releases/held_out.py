"""What a candidate and the live release are both asked: impressions after the training of either, by the log itself.

The impressions are drawn once, over all items and actions of the log, and then put into each checkpoint's own words:
the rows of its item table and its actions, as it would be served. An item that a table lacks is its unknown item.

Shapes: M items of the log, N items of a checkpoint's table, A actions of the log.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np
from pyspark.sql import DataFrame, SparkSession
from pyspark.sql import functions as F

from jobs.baskets import ExamplePlan
from jobs.event_log import read_events
from jobs.examples import build_vocabulary, write_examples
from jobs.protocols import check_plan
from jobs.spark import table_version
from jobs.train import digest, known_actions
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.item_table import UNKNOWN, ItemTable
from models.request import Impression
from models.timelines import FEATURES, impressions_of, timeline_files

_BUCKETS = 1 << 20


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """What decides the impressions, beside the log and when they begin.

    users: at most about so many, chosen by a hash; they have at most per_user impressions each. length: the newest
    events of a history that are looked at.
    """

    protocol: str = "raw"
    per_user: int = 4
    users: int = 10_000
    length: int = 1_000
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOut:
    """Impressions whose items are places in item_ids (from 1 on; 0: unknown) and whose actions are those in actions."""

    digest: str
    from_ms: int
    until_ms: int
    log_version: int
    item_ids: Sequence[str]
    actions: Sequence[str]
    impressions: Sequence[Impression]


def held_out(spark: SparkSession, log: Path, from_ms: int, question: Question, work: Path) -> HeldOut:
    """The impressions from then on, drawn once for each state of the log. Raises InputError when there are none."""
    plan = ExamplePlan(from_ms=from_ms, per_user=question.per_user, protocol=question.protocol, seed=question.seed)
    check_plan(plan)
    version = table_version(spark, log / "events")
    events = read_events(spark, log, version)
    until_ms = events.agg(F.max("event_time_ms")).collect()[0][0]
    if until_ms is None or until_ms < from_ms:
        raise InputError(
            f"{log} has no events since {from_ms}, when the training of the later of the two ended; ingest newer ones, "
            "or hold some out: vql train --before-ms"
        )
    vocabulary, actions = build_vocabulary(events, None, []), known_actions(events)
    name = digest([str(log), version, plan, question.users])
    folder = work / f"heldout-{name}"
    if not (folder / FEATURES).exists():
        write_examples(spark, _of_some(events, from_ms, question.users), vocabulary, actions, plan, folder)
    impressions = [one for file in timeline_files(folder) for one in impressions_of(file)]
    if not impressions:
        raise InputError(f"{log} has no user with a history and a basket since {from_ms}: there is nothing to ask")
    return HeldOut(
        digest=name,
        from_ms=from_ms,
        until_ms=until_ms + 1,
        log_version=version,
        item_ids=vocabulary.fields["item_id"],
        actions=actions,
        impressions=impressions,
    )


def _of_some(events: DataFrame, from_ms: int, users: int) -> DataFrame:
    """The events of about so many of the users who have any since then; of all of them, where they are no more."""
    asked = events.where(F.col("event_time_ms") >= from_ms).select("user_id").distinct()
    share = users / max(1, asked.count())
    bucket = F.pmod(F.crc32(F.col("user_id").cast("binary")), F.lit(_BUCKETS))
    chosen = asked if share >= 1 else asked.where(bucket < int(share * _BUCKETS))
    return events.join(chosen, "user_id", "left_semi")


def in_words_of(checkpoint: Checkpoint, table: ItemTable, asked: HeldOut) -> list[Impression]:
    """The impressions with rows of the checkpoint's item table, and its actions."""
    row_M = np.r_[UNKNOWN, table.lookup(asked.item_ids)]
    action_A = checkpoint.action_index(asked.actions)
    return [
        replace(
            one,
            candidate_C=row_M[one.candidate_C],
            item_L=row_M[one.item_L],
            action_L=action_A[one.action_L],
        )
        for one in asked.impressions
    ]
