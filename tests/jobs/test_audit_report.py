"""The figures of an audit: counted from verdicts, written as JSON, metrics and a picture, and said by an exit code."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from prometheus_client.parser import text_string_to_metric_families

from jobs.audit_report import AuditReport, summary, write_metrics, write_plot, write_report
from jobs.audit_verdicts import AHEAD, BAD, EXTRA, GOOD, LATE, MISSING, NOT_COMPARED, OTHER_EPOCH
from jobs.repair import Repaired
from jobs.row_difference import AGREES, ENTRIES, LATER_ITEMS

NUMBERS = ("read_ms", "partition", "offset", "revision", "stale_ms", "stale_event_ms")


def verdicts(*rows: dict) -> pa.Table:
    usual = {"user_id": "u1", "verdict": AGREES, "error": 0.0, "score_error": None}
    usual |= {"read_ms": 5, "partition": 0, "offset": 7, "revision": 0, "stale_ms": 0, "stale_event_ms": 0}
    schema = [("user_id", pa.string()), ("verdict", pa.string())]
    schema += [(name, pa.float64()) for name in ("error", "score_error")] + [(name, pa.int64()) for name in NUMBERS]
    return pa.Table.from_pylist([usual | row for row in rows], pa.schema(schema))


@pytest.fixture
def report() -> AuditReport:
    found = verdicts(
        {"error": 1e-6, "score_error": 0.25, "stale_ms": 3000, "stale_event_ms": 9000},
        {"user_id": "u2", "verdict": LATER_ITEMS},
        {"user_id": "u3", "verdict": ENTRIES, "error": np.inf, "offset": 70},
        {"user_id": "u4", "verdict": MISSING, "offset": None, "revision": None, "partition": None, "error": None},
        {"user_id": None, "verdict": EXTRA, "stale_ms": 1000},
        *({"verdict": verdict, "stale_ms": 10**6} for verdict in (AHEAD, OTHER_EPOCH, LATE)),
    )
    return AuditReport(
        checkpoint_id="c",
        log="log",
        log_version=3,
        sources={"reads": summary(found), "store": summary(verdicts({}))},
        repaired=Repaired(users=4, rows=3, newer=1, revision=2),
    )


def test_only_what_was_compared_counts(report: AuditReport) -> None:
    reads = report.sources["reads"]
    assert (reads.reads, reads.compared, reads.bad, reads.users) == (8, 5, 3, 4)
    assert (reads.missing, reads.extra) == (1, 1)
    assert reads.mismatch_ratio == pytest.approx(3 / 5)
    assert report.mismatch_ratio == reads.mismatch_ratio > report.sources["store"].mismatch_ratio == 0
    assert reads.score_error_max == 0.25
    # Reads without a row are of no age, and those that were not compared are not of this log.
    assert reads.stale.fresh == pytest.approx(2 / 4)
    assert (reads.stale.quantile_s["0.5"], reads.stale.quantile_s["1.0"]) == (0.5, 3.0)
    assert reads.stale_event.quantile_s["1.0"] == 9.0
    assert [(each.verdict, each.offset) for each in reads.examples] == [(EXTRA, 7), (ENTRIES, 70), (MISSING, None)]


def test_no_reads_are_no_figures() -> None:
    nothing = summary(verdicts())
    assert (nothing.reads, nothing.mismatch_ratio, nothing.stale, nothing.error_max) == (0, 0.0, None, None)


def test_the_report_is_json_without_user_ids(report: AuditReport, tmp_path: Path) -> None:
    write_report(tmp_path / "audit.json", report)
    text = (tmp_path / "audit.json").read_text()
    found = json.loads(text)
    assert found["sources"]["reads"]["mismatch_ratio"] == pytest.approx(0.6)
    assert found["repaired"] == {"users": 4, "rows": 3, "newer": 1, "revision": 2}
    # JSON knows no infinity.
    assert found["sources"]["reads"]["error_max"] > 1e300
    assert not any(f'"u{n}"' in text for n in range(5))


def test_metrics_have_every_verdict(report: AuditReport, tmp_path: Path) -> None:
    path = tmp_path / "audit.prom"
    write_metrics(path, report, 1_800_000_000.5)
    samples = [each for family in text_string_to_metric_families(path.read_text()) for each in family.samples]
    by_name = {(each.name, *(each.labels[name] for name in sorted(each.labels))): each.value for each in samples}
    assert by_name["vql_audit_mismatch_ratio", "reads"] == pytest.approx(0.6)
    assert by_name["vql_audit_end_timestamp_seconds",] == 1_800_000_000.5
    assert by_name["vql_audit_reads", "reads", ENTRIES] == 1
    assert by_name["vql_audit_reads", "store", ENTRIES] == 0
    assert {key[2] for key in by_name if key[0] == "vql_audit_reads"} == {*GOOD, *BAD, *NOT_COMPARED}
    assert (by_name["vql_audit_repaired_rows", "published"], by_name["vql_audit_repaired_rows", "newer"]) == (3, 1)
    assert by_name["vql_audit_stale_seconds", "1.0", "reads"] == 3.0
    assert by_name["vql_audit_error_max", "score", "reads"] == 0.25
    # Another user's collector reads it.
    assert path.stat().st_mode & 0o044 == 0o044


def test_the_picture_is_one(report: AuditReport, tmp_path: Path) -> None:
    write_plot(tmp_path / "audit.png", report)
    assert (tmp_path / "audit.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
