"""The command `vql audit`: its options, and what it found as a table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from jobs.cli_options import LOCAL, CheckpointPath, Log, Master, State

if TYPE_CHECKING:
    from jobs.audit_report import AuditReport, SourceReport, Staleness

# The rows that were compared do not agree with the log as far as they have to.
DISAGREES = 9
out = Console(highlight=False)


def audit(
    checkpoint: CheckpointPath,
    log: Log,
    state: State,
    read_log: Annotated[
        Path | None, typer.Option(resolve_path=True, help="What vql serve --read-log writes; needs its key, as there.")
    ] = None,
    keep_days: Annotated[
        int | None, typer.Option(min=1, help="Then delete logged reads that are older; absent: keep all.")
    ] = None,
    hours: Annotated[float, typer.Option(min=0.0, help="How far back reads are audited.")] = 24.0,
    store_sample: Annotated[int, typer.Option(min=0, help="Users whose rows in the store are audited.")] = 0,
    repair: Annotated[bool, typer.Option("--repair", help="Publish the rows anew that do not agree.")] = False,
    mismatch_max: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of the reads that may disagree; more: exit code 9.")
    ] = 0.0,
    error_max: Annotated[float, typer.Option(min=0.0, help="Error of a row's numbers that is rounding.")] = 1e-4,
    score_error_max: Annotated[
        float, typer.Option(min=0.0, help="Error of a score that is rounding; more where means are of half precision.")
    ] = 1e-3,
    grace: Annotated[
        float, typer.Option(min=0.0, help="Seconds in which a new user may be without a row, after the first event.")
    ] = 60.0,
    output: Annotated[Path | None, typer.Option(resolve_path=True, help="The report, as JSON.")] = None,
    plot: Annotated[Path | None, typer.Option(resolve_path=True, help="Staleness, as PNG.")] = None,
    metrics_file: Annotated[
        Path | None, typer.Option(resolve_path=True, help="Metrics for Prometheus, as a text file (*.prom).")
    ] = None,
    master: Master = LOCAL,
) -> None:
    """Compare what rankers read, and what the store holds, with the rows that the event log gives for the same stamps.

    --checkpoint may also be a table of releases, whose live one is audited. Users of logged reads are found by the hash
    of VQL_USER_HASH_KEY_FILE; of the forgotten only the empty row is right. Exit code 9: more reads disagree than may.
    --repair never replaces a row that is newer than the log's copy: run it again when that has caught up.

    Example: vql audit --checkpoint live --log build/log --state build/state --read-log build/reads --store-sample 1000
    """
    from feature_repo.handle import StoreHandle
    from jobs.audit import DAY_MS, AuditPlan
    from jobs.audit import audit as run
    from jobs.audit_reads import LoggedReads
    from jobs.audit_report import write_metrics, write_plot, write_report
    from jobs.audit_verdicts import Tolerance
    from jobs.read_log import day_of, forget_before
    from jobs.releases.table import live_path
    from jobs.spark import open_spark
    from models.checkpoint import open_checkpoint
    from models.user_hash import chosen_key_file

    now_ms = int(time.time() * 1000)
    reads = None
    if read_log is not None:
        since_ms = now_ms - round(hours * 3_600_000)
        reads = LoggedReads(path=read_log, key_file=chosen_key_file(), since_ms=since_ms, until_ms=now_ms)
    plan = AuditPlan(
        reads=reads,
        store_users=store_sample,
        now_ms=now_ms,
        tolerance=Tolerance(error=error_max, score=score_error_max, grace_ms=round(grace * 1000)),
        repair=repair,
    )
    opened = open_checkpoint(live_path(checkpoint))
    report = run(open_spark(master), opened, log, StoreHandle(state=state), plan)
    if read_log is not None and keep_days is not None:
        forget_before(read_log, day_of(now_ms - keep_days * DAY_MS))
    if output is not None:
        write_report(output, report)
    if plot is not None:
        write_plot(plot, report)
    if metrics_file is not None:
        write_metrics(metrics_file, report, time.time())
    _show(report)
    if report.mismatch_ratio > mismatch_max:
        out.print(f"{report.mismatch_ratio:.2%} of the reads disagree; {mismatch_max:.2%} may", soft_wrap=True)
        raise typer.Exit(DISAGREES)


def _show(report: AuditReport) -> None:
    table = Table(title=f"audit of checkpoint {report.checkpoint_id}, log version {report.log_version}")
    table.add_column("")
    for name in report.sources:
        table.add_column(name, justify="right")
    columns = [_cells(source) for source in report.sources.values()]
    for row in dict.fromkeys(row for column in columns for row in column):
        table.add_row(row, *(column.get(row, "") for column in columns))
    out.print(table)
    if report.repaired is not None:
        done = report.repaired
        out.print(
            f"{done.rows:,} of {done.users:,} wrong rows published anew; {done.newer:,} are newer than the log",
            soft_wrap=True,
        )


def _cells(source: SourceReport) -> dict[str, str]:
    cells = {
        "reads": f"{source.reads:,}",
        "users": f"{source.users:,}",
        "compared": f"{source.compared:,}",
        "do not agree": f"{source.bad:,} ({source.mismatch_ratio:.3%})",
    }
    cells |= {f"  {verdict}": f"{count:,}" for verdict, count in source.by_verdict.items()}
    for name, error in (("largest error, rows", source.error_max), ("largest error, scores", source.score_error_max)):
        cells[name] = "" if error is None else f"{error:.2g}"
    cells["stale, in the log for (s)"] = _stale(source.stale)
    cells["stale, by event time (s)"] = _stale(source.stale_event)
    return cells


def _stale(stale: Staleness | None) -> str:
    """Quantiles, and the share of reads that lacked nothing."""
    if stale is None:
        return ""
    return " / ".join(f"{seconds:,.1f}" for seconds in stale.quantile_s.values()) + f", {stale.fresh:.1%} lack nothing"
