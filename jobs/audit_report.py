"""What an audit found, as figures: for the JSON report, for Prometheus, and as a picture."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric

from jobs.audit_verdicts import BAD, EXTRA, GOOD, MISSING, NOT_COMPARED
from jobs.plots import new_figure, png
from jobs.repair import Repaired
from models.files import replace_file

QUANTILES = (0.5, 0.9, 0.99, 1.0)
EXAMPLES = 20


class Staleness(msgspec.Struct, frozen=True, kw_only=True):
    """Over reads: seconds at quantiles ("0.5" ... "1.0"), and which share of the reads had all that was in the log."""

    fresh: float
    quantile_s: dict[str, float]


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """A read that does not agree: by the row's position in the log, which says whose it is to who may read the log."""

    verdict: str
    read_ms: int
    partition: int | None
    offset: int | None
    revision: int | None
    error: float | None
    score_error: float | None


class SourceReport(msgspec.Struct, frozen=True, kw_only=True):
    """The reads of one source. compared: those of a verdict that is good or bad; bad: those that do not agree.

    error_max, score_error_max: of all that were compared so far as this; None where none was. stale: since the oldest
    event that a row lacked was in the log; stale_event: by that event's own time.
    """

    reads: int
    users: int
    compared: int
    bad: int
    by_verdict: dict[str, int]
    error_max: float | None
    score_error_max: float | None
    stale: Staleness | None
    stale_event: Staleness | None
    examples: list[Example]

    @property
    def mismatch_ratio(self) -> float:
        """Of the reads compared, which share does not agree."""
        return self.bad / self.compared if self.compared else 0.0

    @property
    def missing(self) -> int:
        """Reads that found no row of a user who has events."""
        return self.by_verdict.get(MISSING, 0)

    @property
    def extra(self) -> int:
        """Reads that found a row of a user who has no events."""
        return self.by_verdict.get(EXTRA, 0)


class AuditReport(msgspec.Struct, frozen=True, kw_only=True):
    """All sources; repaired: None where no repair was asked for."""

    checkpoint_id: str
    log: str
    log_version: int
    sources: dict[str, SourceReport]
    repaired: Repaired | None

    @property
    def mismatch_ratio(self) -> float:
        """The largest of the sources'."""
        return max((source.mismatch_ratio for source in self.sources.values()), default=0.0)


def summary(verdicts: pa.Table) -> SourceReport:
    """The figures of one source's verdicts (`audit_verdicts.judged`)."""
    by_verdict = {each["verdict"]: each["verdict_count"] for each in _counted(verdicts)}
    compared = {verdict: n for verdict, n in by_verdict.items() if verdict not in NOT_COMPARED}
    assert compared.keys() <= {*GOOD, *BAD}, compared
    bad = verdicts.filter(pc.is_in(verdicts["verdict"], pa.array(BAD)))
    aged = verdicts.filter(
        pc.and_(pc.is_in(verdicts["verdict"], pa.array([*GOOD, *BAD])), pc.is_valid(verdicts["offset"]))
    )
    columns = ["verdict", "read_ms", "partition", "offset", "revision", "error", "score_error"]
    examples = bad.sort_by([("read_ms", "ascending"), ("offset", "ascending")]).select(columns).slice(0, EXAMPLES)
    return SourceReport(
        reads=verdicts.num_rows,
        users=pc.count_distinct(verdicts["user_id"]).as_py(),
        compared=sum(compared.values()),
        bad=bad.num_rows,
        by_verdict=dict(sorted(by_verdict.items())),
        error_max=_number(pc.max(verdicts["error"]).as_py()),
        score_error_max=_number(pc.max(verdicts["score_error"]).as_py()),
        stale=_staleness(aged["stale_ms"]),
        stale_event=_staleness(aged["stale_event_ms"]),
        examples=[
            Example(**(row | {name: _number(row[name]) for name in ("error", "score_error")}))
            for row in examples.to_pylist()
        ],
    )


def write_report(path: Path, report: AuditReport) -> None:
    """As JSON, with each source's mismatch_ratio."""
    plain = msgspec.to_builtins(report)
    for name, source in report.sources.items():
        plain["sources"][name]["mismatch_ratio"] = source.mismatch_ratio
    replace_file(path, msgspec.json.format(msgspec.json.encode(plain), indent=2))


def write_metrics(path: Path, report: AuditReport, end_s: float) -> None:
    """For a collector of text files; whole or not at all."""
    registry = CollectorRegistry()
    registry.register(AuditMetrics(report, end_s))
    replace_file(path, generate_latest(registry))
    # A temporary file is its owner's alone; the collector is another user.
    path.chmod(0o644)


def write_plot(path: Path, report: AuditReport) -> None:
    """Staleness by quantile, of each source."""
    figure, axes = new_figure()
    for name, source in report.sources.items():
        for what, stale in (("in the log", source.stale), ("event time", source.stale_event)):
            if stale is not None:
                quantiles = [float(quantile) for quantile in stale.quantile_s]
                axes.plot(quantiles, list(stale.quantile_s.values()), marker="o", label=f"{name}, {what}")
    axes.set(xlabel="share of the reads", ylabel="seconds", title="The oldest event that a row lacked when it was read")
    axes.set_yscale("symlog", linthresh=1.0)
    if axes.lines:
        axes.legend()
    replace_file(path, png(figure))


class AuditMetrics:
    """A report as gauges."""

    def __init__(self, report: AuditReport, end_s: float) -> None:
        self._report, self._end_s = report, end_s

    def collect(self) -> Iterator[Metric]:
        """What prometheus_client asks of a collector."""
        reads = _gauge("reads", "Reads that were audited, by verdict.", "source", "verdict")
        ratio = _gauge("mismatch_ratio", "Of the reads compared, which share does not agree with the log.", "source")
        error = _gauge("error_max", "The largest error of a row's numbers, or of a score.", "source", "of")
        stale = _gauge("stale_seconds", "Age of the oldest event in the log that a row lacked.", "source", "quantile")
        for name, source in self._report.sources.items():
            for verdict in (*GOOD, *BAD, *NOT_COMPARED):
                reads.add_metric([name, verdict], source.by_verdict.get(verdict, 0))
            ratio.add_metric([name], source.mismatch_ratio)
            for of, value in (("row", source.error_max), ("score", source.score_error_max)):
                if value is not None:
                    error.add_metric([name, of], value)
            for quantile, seconds in (source.stale.quantile_s if source.stale else {}).items():
                stale.add_metric([name, quantile], seconds)
        yield from (reads, ratio, error, stale)
        repaired = _gauge("repaired_rows", "Wrong rows, published anew or left because they are newer.", "outcome")
        if self._report.repaired is not None:
            repaired.add_metric(["published"], self._report.repaired.rows)
            repaired.add_metric(["newer"], self._report.repaired.newer)
        yield repaired
        end = _gauge("end_timestamp_seconds", "When the audit ended, Unix time.")
        end.add_metric([], self._end_s)
        yield end


def _gauge(name: str, words: str, *labels: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"vql_audit_{name}", words, labels=labels)


def _counted(verdicts: pa.Table) -> list[dict]:
    return verdicts.group_by("verdict").aggregate([("verdict", "count")]).to_pylist()


def _number(value: float | None) -> float | None:
    """JSON has no infinity; an entry that is no number at all is as wrong as can be."""
    return value if value is None or math.isfinite(value) else float(np.finfo(np.float64).max)


def _staleness(stale_ms: pa.ChunkedArray) -> Staleness | None:
    if not len(stale_ms):
        return None
    stale_ms_N = stale_ms.to_numpy()
    quantile_s = {str(q): float(np.quantile(stale_ms_N, q)) / 1000 for q in QUANTILES}
    return Staleness(fresh=float((stale_ms_N == 0).mean()), quantile_s=quantile_s)
