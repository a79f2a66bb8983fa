"""The gate: whether a candidate may follow what is live, by figures of both on what neither was trained on.

A candidate is refused

* when its GAUC may be worse by more than the margin: when less than that margin is not outside of the 95 % interval
  (paired bootstrap over users; the usual test of non-inferiority). Few held-out users make the interval wide, so they
  refuse a candidate too;
* when its GAUC is not above chance, or a group of its codebook has collapsed. That is all where nothing is live.

The margin's default, 0.01: seeds of one training differ by 0.001 to 0.008 (README's table), and the interval of 2,000
users reaches 0.001 to 0.003 to each side, so an equal model passes. Key errors are no part of it: they say nothing of
accuracy. Row sizes are shown, and refused by nobody: memory is for people to decide.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
from pyspark.sql import SparkSession

from jobs.evaluate import Quality, Scores, kept_scores, quality, score_raw
from jobs.event_log import trained_until_ms
from jobs.releases.held_out import HeldOut, Question, held_out, in_words_of
from jobs.spark import errors_of_workers
from jobs.study.compare import Difference, difference, difference_of_auc, difference_of_logloss
from jobs.study.costs import row_of
from jobs.train import digest
from models.checkpoint import Checkpoint
from models.diagnostics import Usage
from models.errors import InputError
from models.item_table import UNKNOWN
from models.load import load_ranker_of
from models.request import Impression
from models.row import Fold, encode_row

MARGIN = 0.01
# A group with an effective number of codewords under this cannot tell events apart.
PERPLEXITY_MIN = 2.0
ROWS_SIZED = 500


class Bytes(msgspec.Struct, frozen=True, kw_only=True):
    """Sizes of rows of users who were asked about."""

    mean: float
    p50: float
    p99: float
    max: float


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """The figures of one checkpoint. unknown_items: the share of the log's items that its item table lacks."""

    checkpoint_id: str
    path: str
    quality: Quality
    above_chance: Difference
    usage: list[Usage]
    row_bytes: Bytes
    unknown_items: float


class Gaps(msgspec.Struct, frozen=True, kw_only=True):
    """The candidate's figures less those of what is live. Of logloss less is better."""

    gauc: Difference
    auc: Difference
    logloss: Difference


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate was judged by. live, gaps: None where nothing was live. log_version: Delta's."""

    candidate: Side
    live: Side | None
    gaps: Gaps | None
    log: str
    log_version: int
    from_ms: int
    until_ms: int
    question: Question
    impressions: int
    users: int


class Judgement(msgspec.Struct, frozen=True, kw_only=True):
    """A report and what followed from it. refusals: why not. forced: why all the same."""

    report: Report
    margin: float
    refusals: list[str]
    forced: str | None

    @property
    def passed(self) -> bool:
        return not self.refusals or self.forced is not None

    @property
    def verdict(self) -> str:
        """In a line, with the figures."""
        side, of = self.report.candidate, f"{self.report.users:,} users"
        if self.refusals:
            forced = "" if self.forced is None else f"forced ({self.forced}) although "
            return f"{forced}{'; '.join(self.refusals)}; {of}"
        if self.report.live is None or self.report.gaps is None:
            return f"nothing is live: GAUC {side.quality.gauc:.4f}, {words(side.above_chance)} above chance; {of}"
        gap = words(self.report.gaps.gauc)
        return f"GAUC {side.quality.gauc:.4f}, {gap} against {self.report.live.checkpoint_id}; {of}"


@errors_of_workers()
def compare(
    spark: SparkSession, candidate: Checkpoint, live: Checkpoint | None, log: Path, question: Question, work: Path
) -> Report:
    """The figures of both. What takes long is kept in the work folder. Raises InputError for a log without answers."""
    sides = [candidate] if live is None else [candidate, live]
    from_ms = max(trained_until_ms(spark, log, each) for each in sides)
    asked = held_out(spark, log, from_ms, question, work)
    judged = [_side(each, asked, question, work) for each in sides]
    gaps = None if live is None else _gaps(judged[0][1], judged[1][1])
    return Report(
        candidate=judged[0][0],
        live=None if live is None else judged[1][0],
        gaps=gaps,
        log=str(log),
        log_version=asked.log_version,
        from_ms=asked.from_ms,
        until_ms=asked.until_ms,
        question=question,
        impressions=len(asked.impressions),
        users=len({one.user_id for one in asked.impressions}),
    )


def judge(report: Report, margin: float, forced: str | None = None) -> Judgement:
    """What follows from the figures."""
    side, gaps = report.candidate, report.gaps
    refusals = []
    if report.live is not None and gaps is not None and gaps.gauc.low < -margin:
        refusals.append(
            f"GAUC {side.quality.gauc:.4f} is {words(gaps.gauc)} against the live release's "
            f"{report.live.quality.gauc:.4f}: it may be worse by more than the margin of {margin:g}"
        )
    if side.above_chance.low <= 0:
        refusals.append(f"GAUC {side.quality.gauc:.4f} is no better than chance ({words(side.above_chance)} from 0.5)")
    collapsed = [(g, usage) for g, usage in enumerate(side.usage) if usage.perplexity < PERPLEXITY_MIN]
    refusals += [f"group {g} of the codebook has collapsed: a perplexity of {u.perplexity:.2f}" for g, u in collapsed]
    return Judgement(report=report, margin=margin, refusals=refusals, forced=forced if refusals else None)


def words(difference: Difference) -> str:
    """As people read it."""
    return f"{difference.mean:+.4f} ({difference.low:+.4f} to {difference.high:+.4f})"


def _side(checkpoint: Checkpoint, asked: HeldOut, question: Question, work: Path) -> tuple[Side, Scores]:
    fold = checkpoint.fold()
    table, manifest = fold.table, checkpoint.manifest
    impressions = in_words_of(checkpoint, table, asked)
    # A table that has grown gives other scores.
    name = digest([checkpoint.checkpoint_id, len(table), asked.digest, question.length])
    score = _scorer(checkpoint, fold, impressions, question.length)
    scores = kept_scores(work / "scores" / f"{name}.npz", score)
    above = difference([scores], [replace(scores, logit_N=np.zeros_like(scores.logit_N))])
    if above is None:
        raise InputError("no held-out user took some candidates and left others: nothing can be told")
    side = Side(
        checkpoint_id=checkpoint.checkpoint_id,
        path=str(checkpoint.path),
        quality=quality(scores),
        above_chance=above,
        usage=[] if manifest.diagnostics is None else manifest.diagnostics.usage,
        row_bytes=_row_bytes(impressions, fold),
        unknown_items=float(np.mean(table.lookup(asked.item_ids) == UNKNOWN)),
    )
    return side, scores


def _scorer(checkpoint: Checkpoint, fold: Fold, impressions: list[Impression], length: int) -> Callable[[], Scores]:
    def score() -> Scores:
        ranker = load_ranker_of(checkpoint, fold.table)
        return score_raw(ranker, impressions, length)

    return score


def _gaps(candidate: Scores, live: Scores) -> Gaps:
    gauc = difference([candidate], [live])
    assert gauc is not None, "both were compared with chance before"
    return Gaps(gauc=gauc, auc=difference_of_auc(candidate, live), logloss=difference_of_logloss(candidate, live))


def _row_bytes(impressions: list[Impression], fold: Fold) -> Bytes:
    """Of rows with the whole history before each user's last impression; of some of the users, drawn."""
    last = list({one.user_id: one for one in impressions}.values())
    drawn = np.random.default_rng(0).permutation(len(last))[:ROWS_SIZED]
    rows = [row_of(last[u], fold, len(last[u].item_L)) for u in drawn]
    size_U = np.array([encode_row(row).size_bytes for row in rows])
    p50, p99 = np.percentile(size_U, [50, 99])
    return Bytes(mean=float(size_U.mean()), p50=float(p50), p99=float(p99), max=float(size_U.max()))
