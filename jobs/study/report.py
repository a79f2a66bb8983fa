"""The figures of a study as a table for the terminal and for a README, and as one HTML page with plots."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from jobs.plots import new_figure, write_page
from jobs.study.compare import Over
from jobs.study.run import Figures

COLUMNS = ("GAUC", "against", "repeat", "novel", "AUC", "log loss", "bytes/user", "ms/500", "train s")


def markdown(study: Mapping[str, Any]) -> str:
    """A table as a README has it; the best GAUC first."""
    lines = [("model", *COLUMNS), ("---", *("---:" for _ in COLUMNS))]
    lines += [(name, *cells) for name, cells in rows(study).items()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def title(study: Mapping[str, Any]) -> str:
    """What the figures are of."""
    return (
        f"{study['data']}, {study['protocol']}, {study['length']:,} events, {study['seeds']} seeds, "
        f"{study['impressions']:,} impressions of {study['users']:,} users"
    )


def rows(study: Mapping[str, Any]) -> dict[str, tuple[str, ...]]:
    """The cells of each model, the best GAUC first. "against": less the reference's GAUC, with 95 % intervals."""
    results: Mapping[str, Figures] = study["results"]
    best_first = sorted(results.items(), key=lambda row: row[1].gauc.mean if row[1].gauc else 0.0, reverse=True)
    return {name: _cells(figures) for name, figures in best_first}


def write_html(path: Path, study: Mapping[str, Any]) -> None:
    """One self-contained page."""
    plots = {"GAUC: mean and spread over seeds": _gauc_plot(study), "GAUC against milliseconds": _cost_plot(study)}
    if any(len(figures.by_length) > 1 for figures in study["results"].values()):
        plots["GAUC by the newest events that a model looks at"] = _ladder_plot(study)
    write_page(path, "study/report.html.j2", plots, study=study, title=title(study), columns=COLUMNS, rows=rows(study))


def _cells(figures: Figures) -> tuple[str, ...]:
    gap, slices = figures.against_reference, figures.slices
    return (
        _over(figures.gauc),
        f"{gap.mean:+.4f} ({gap.low:+.4f} {gap.high:+.4f})" if gap else "",
        *(_over(slices[name].gauc) if name in slices else "" for name in ("repeat", "novel")),
        _over(figures.auc),
        _over(figures.logloss),
        f"{figures.bytes_per_user:,.0f}",
        f"{figures.ms_per_500:.2f}",
        f"{figures.train_s.mean:,.0f}" if figures.train_s else "",
    )


def _over(figure: Over | None) -> str:
    return f"{figure.mean:.4f} ±{figure.spread:.4f}" if figure else ""


def _gauc_plot(study: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure()
    names = [name for name in rows(study) if study["results"][name].gauc]
    gaucs = [study["results"][name].gauc for name in names]
    axes.errorbar([g.mean for g in gaucs], names, xerr=[g.spread for g in gaucs], fmt="o", capsize=3)
    axes.invert_yaxis()
    axes.set(xlabel="GAUC")
    return figure


def _cost_plot(study: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure()
    for name, figures in study["results"].items():
        if figures.gauc:
            axes.scatter(figures.ms_per_500, figures.gauc.mean)
            axes.annotate(name, (figures.ms_per_500, figures.gauc.mean), xytext=(4, 4), textcoords="offset points")
    axes.set(xlabel="milliseconds for 500 candidates, events at hand", ylabel="GAUC", xscale="log")
    return figure


def _ladder_plot(study: Mapping[str, Any]) -> Figure:
    figure, axes = new_figure()
    for name, figures in study["results"].items():
        steps = sorted((int(length), gauc.mean) for length, gauc in figures.by_length.items() if gauc)
        axes.plot(*zip(*steps, strict=True), marker=".", label=name)
    axes.set(xlabel="newest events", ylabel="GAUC", xscale="log")
    axes.legend(fontsize="small")
    return figure
