"""The demo's report: report.json for programs, report.html (one self-contained file with plots) for people."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
from matplotlib.figure import Figure

from jobs.evaluate import Quality, Scores, quality
from jobs.ingest import IngestReport
from jobs.parity import RowParity
from jobs.plots import bars, new_figure, write_page
from models.files import replace_file

PACKAGES = ("apache-beam", "feast", "pyspark", "delta-spark", "deltalake", "torch", "pyarrow", "numpy", "numba")


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamFacts:
    """What the report needs of a stream's run."""

    events_folded: int
    events_skipped: int
    dead_letters: int
    seconds: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence:
    """All that the demo measured. Scores by model, with "vql_raw" beside "vql"; U rows, G groups, K codewords."""

    history: IngestReport
    arrived: IngestReport
    streamed: StreamFacts
    redelivered: StreamFacts
    rows: RowParity
    scores: dict[str, Scores]
    impressions: int
    row_bytes_U: np.ndarray
    row_events_U: np.ndarray
    usage_GK: np.ndarray
    losses: dict[str, list[float]]
    stage_s: dict[str, float]


class Events(msgspec.Struct, frozen=True, kw_only=True):
    """Events by what became of them."""

    history: int
    streamed: int
    dead_letters: int
    duplicates_skipped: int


class Parity(msgspec.Struct, frozen=True, kw_only=True):
    """The largest differences from the independent computations, over all users."""

    users_compared: int
    row_max_abs_error: float
    score_max_abs_error: float
    count_conservation: bool


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """Throughput of the stream, start-up included."""

    events_per_s: float
    seconds: float


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """report.json."""

    events: Events
    users: int
    parity: Parity
    quality: dict[str, Quality]
    stream: Stream
    row_bytes: dict[str, float]
    stage_seconds: dict[str, float]
    versions: dict[str, str]
    impressions: int
    verdict: str


def write_report(folder: Path, evidence: Evidence) -> Report:
    """Write report.json and report.html into the folder."""
    report = _report(evidence)
    replace_file(folder / "report.json", msgspec.json.format(msgspec.json.encode(report), indent=2))
    write_page(
        folder / "report.html",
        "report.html.j2",
        _plots(evidence),
        report=report,
        evidence=evidence,
        machine=_machine(),
    )
    return report


def _report(evidence: Evidence) -> Report:
    scores = evidence.scores
    figures = {model: quality(s) for model, s in scores.items() if model != "vql_raw"}
    streamed = evidence.streamed
    p50, p99 = np.percentile(evidence.row_bytes_U, [50, 99])
    return Report(
        events=Events(
            history=evidence.history.appended,
            streamed=streamed.events_folded,
            dead_letters=streamed.dead_letters + evidence.history.quarantined + evidence.arrived.quarantined,
            duplicates_skipped=streamed.events_skipped + evidence.redelivered.events_skipped,
        ),
        users=evidence.rows.users,
        parity=Parity(
            users_compared=evidence.rows.users,
            row_max_abs_error=evidence.rows.max_abs_error,
            score_max_abs_error=float(np.abs(scores["vql"].logit_N - scores["vql_raw"].logit_N).max()),
            count_conservation=evidence.rows.conserved,
        ),
        quality=figures,
        stream=Stream(events_per_s=streamed.events_folded / streamed.seconds, seconds=streamed.seconds),
        row_bytes={"p50": float(p50), "p99": float(p99), "max": float(evidence.row_bytes_U.max())},
        stage_seconds=evidence.stage_s,
        versions={p: importlib.metadata.version(p) for p in PACKAGES} | {"python": platform.python_version()},
        impressions=evidence.impressions,
        verdict=_verdict(figures),
    )


def _verdict(figures: dict[str, Quality]) -> str:
    """Where VQL stands, in a sentence."""
    ahead = figures["vql"].gauc - figures["din_50"].gauc
    floor = figures["vql"].gauc - figures["no_history"].gauc
    place = "ahead of" if ahead > 0.005 else "behind" if ahead < -0.005 else "tied (within 0.005) with"
    return (
        f"VQL over the whole history is {place} DIN over the newest 50 events: GAUC {figures['vql'].gauc:.4f} against "
        f"{figures['din_50'].gauc:.4f} ({ahead:+.4f}); it is {floor:+.4f} against no history. "
        "One seed, one short epoch: a smoke test of quality, not a benchmark."
    )


def _machine() -> str:
    return f"{os.cpu_count()} cores, {platform.system()} {platform.machine()}"


def _plots(evidence: Evidence) -> dict[str, Figure]:
    """The plots by caption."""
    return {
        "Training loss (running mean of 20 steps)": _loss_plot(evidence),
        "Items by codeword, each group sorted by use: a flat line is a well used codebook": _usage_plot(evidence),
        "Bytes of a row by events in it": _bytes_plot(evidence),
        "Scores from the cache against scores from attention over the raw history": _score_plot(evidence),
        "Throughput of each stage that handles events, start-up included": _throughput_plot(evidence),
        "Seconds by stage": bars(evidence.stage_s, "s"),
    }


def _loss_plot(evidence: Evidence) -> Figure:
    figure, axes = new_figure()
    for model, losses in evidence.losses.items():
        smooth = np.convolve(losses, np.ones(20) / 20, "valid") if len(losses) >= 20 else np.array(losses)
        axes.plot(np.arange(len(smooth)) + len(losses) - len(smooth), smooth, label=model)
    axes.set(xlabel="step", ylabel="binary cross-entropy")
    axes.legend()
    return figure


def _usage_plot(evidence: Evidence) -> Figure:
    figure, axes = new_figure()
    for g, usage in enumerate(evidence.usage_GK):
        axes.plot(np.sort(usage)[::-1], label=f"group {g}: {int((usage > 0).sum())} used")
    axes.set(xlabel="codeword, by rank", ylabel="items", yscale="symlog")
    axes.legend()
    return figure


def _bytes_plot(evidence: Evidence) -> Figure:
    figure, axes = new_figure()
    axes.scatter(evidence.row_events_U, evidence.row_bytes_U, s=4, alpha=0.4, label="row")
    events = np.geomspace(1, max(2, evidence.row_events_U.max()), 50)
    axes.plot(events, 24 * events, "--", color="gray", label="raw events of 24 bytes")
    axes.set(xlabel="events", ylabel="bytes", xscale="log", yscale="log")
    axes.legend()
    return figure


def _score_plot(evidence: Evidence) -> Figure:
    figure, axes = new_figure()
    axes.scatter(evidence.scores["vql_raw"].logit_N, evidence.scores["vql"].logit_N, s=2, alpha=0.3)
    axes.set(xlabel="logit from the raw history", ylabel="logit from the cache")
    return figure


def _throughput_plot(evidence: Evidence) -> Figure:
    events = {
        "ingest": evidence.history.read,
        "backfill": evidence.history.appended,
        "stream": evidence.streamed.events_folded,
        "redeliver": evidence.redelivered.events_skipped,
    }
    return bars({stage: n / evidence.stage_s[stage] for stage, n in events.items()}, "events/s")
