"""report.json has the keys that programs rely on, and report.html needs nothing but itself."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from jobs.evaluate import Scores, quality
from jobs.ingest import IngestReport
from jobs.parity import RowParity
from jobs.report import Evidence, StreamFacts, write_report

CONTRACT = {
    "events": {"history", "streamed", "dead_letters", "duplicates_skipped"},
    "parity": {"users_compared", "row_max_abs_error", "score_max_abs_error", "count_conservation"},
    "stream": {"events_per_s", "seconds"},
    "row_bytes": {"p50", "p99", "max"},
}
PLOTS = 6
STAGE_S = {"ingest": 3.0, "train vql": 60.0, "backfill": 2.0, "stream": 4.0, "redeliver": 2.0}


def scores(noise: float, seed: int = 0) -> Scores:
    """Twenty users with ten candidates each; the more noise, the less the logits say."""
    rng = np.random.default_rng(seed)
    label_N = np.tile([1, 1, *[0] * 8], 20)
    return Scores(
        logit_N=label_N + noise * rng.normal(size=200), label_N=label_N, user_N=np.arange(200) // 10, seen_N=label_N > 1
    )


def evidence(**changes) -> Evidence:
    vql = scores(1.0)
    whole = Evidence(
        history=IngestReport(read=1000, appended=990, already=4, quarantined=6),
        arrived=IngestReport(read=100, appended=97, already=0, quarantined=3),
        streamed=StreamFacts(events_folded=97, events_skipped=2, dead_letters=1, seconds=4.0),
        redelivered=StreamFacts(events_folded=0, events_skipped=1087, dead_letters=0, seconds=2.0),
        rows=RowParity(users=20, max_abs_error=2e-6, missing=0, miscounted=0, row_events=1087, log_events=1087),
        scores={
            "vql": vql,
            "vql_raw": replace(vql, logit_N=vql.logit_N + 3e-6),
            "din_50": scores(2.0, 1),
            "no_history": scores(20.0, 2),
        },
        impressions=20,
        row_bytes_U=np.arange(100.0, 301.0),
        row_events_U=np.arange(1, 202),
        usage_GK=np.random.default_rng(0).integers(0, 9, (4, 16)),
        losses={"vql": np.linspace(0.7, 0.3, 60).tolist(), "din_50": [0.5] * 30, "no_history": [0.6]},
        stage_s=STAGE_S,
    )
    return replace(whole, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(folder, evidence())
    return folder


def test_programs_find_the_figures(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_bytes())
    for key, wanted in CONTRACT.items():
        assert set(report[key]) == wanted
    assert report["events"] == {"history": 990, "streamed": 97, "dead_letters": 10, "duplicates_skipped": 1089}
    assert report["users"] == report["parity"]["users_compared"] == 20
    assert report["parity"]["row_max_abs_error"] == 2e-6
    assert report["parity"]["score_max_abs_error"] == pytest.approx(3e-6, rel=1e-3)
    assert report["parity"]["count_conservation"] is True
    assert report["stream"] == {"events_per_s": 97 / 4, "seconds": 4.0}
    assert report["row_bytes"] == {"p50": 200.0, "p99": 298.0, "max": 300.0}
    assert report["stage_seconds"] == STAGE_S
    assert {"python", "torch", "pyspark", "apache-beam"} <= set(report["versions"])


def test_quality_is_that_of_each_model(folder: Path) -> None:
    report = json.loads((folder / "report.json").read_bytes())
    assert set(report["quality"]) == {"vql", "din_50", "no_history"}
    for model, figures in report["quality"].items():
        wanted = quality(evidence().scores[model])
        assert figures == {"auc": wanted.auc, "gauc": wanted.gauc, "logloss": wanted.logloss}


def test_the_page_needs_nothing_but_itself(folder: Path) -> None:
    html = (folder / "report.html").read_text()
    assert re.findall(r"""\b(?:src|href)\s*=\s*(?!["']data:)\S{9}""", html) == []
    assert "<script" not in html
    assert "@import" not in html
    assert "url(" not in html
    images = re.findall(r'<img src="data:image/png;base64,([^"]+)"', html)
    assert len(images) == PLOTS
    assert all(image.startswith("iVBOR") and len(image) > 5000 for image in images)


def test_the_page_says_what_the_file_says(folder: Path) -> None:
    html, report = (folder / "report.html").read_text(), json.loads((folder / "report.json").read_bytes())
    assert report["verdict"] in html
    for model, figures in report["quality"].items():
        assert model in html
        assert f"{figures['gauc']:.4f}" in html
    assert ">yes<" in html


def test_a_lost_event_shows_in_both(tmp_path: Path) -> None:
    rows = RowParity(users=20, max_abs_error=2e-6, missing=0, miscounted=1, row_events=1086, log_events=1087)
    assert not write_report(tmp_path, evidence(rows=rows)).parity.count_conservation
    assert ">NO<" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("rival", "place"),
    [(scores(9.0, 1), "ahead of"), (scores(0.1, 1), "behind"), (scores(1.0), "tied (within 0.005) with")],
)
def test_the_verdict_is_by_gauc_against_the_rival(tmp_path: Path, rival: Scores, place: str) -> None:
    verdict = write_report(tmp_path, evidence(scores=evidence().scores | {"din_50": rival})).verdict
    assert f"is {place} DIN" in verdict
    assert "not a benchmark" in verdict
