"""The command `vql inspect`: what a checkpoint is, and what quantisation does to its attention."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec import UNSET
from rich.console import Console
from rich.table import Table

from jobs.cli_options import resolved_checkpoint_path

if TYPE_CHECKING:
    from models.checkpoint import Checkpoint
    from models.diagnostics import Diagnostics

out = Console(highlight=False)


def inspect(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            parser=resolved_checkpoint_path, metavar="PATH|URL", help="A checkpoint directory, made by vql train."
        ),
    ],
    plot: Annotated[Path | None, typer.Option(resolve_path=True, help="Also draw it: a PNG file to write.")] = None,
) -> None:
    """Show a checkpoint's sizes and training, the largest row, and what its codebook does to attention.

    [b]used, perplexity[/b]: codewords that the training events have, and how evenly. [b]key error[/b]: |k - c| / |k|.
    [b]attention[/b]: sum |p - p'| of exact and quantised weights by the length of the history (2 is the most there can
    be; VQL's claim is that it does not grow), and the bound that the largest key error gives. None of these says how
    well a model ranks: vql evaluate does.

    Example: vql inspect build/checkpoints/vql --plot build/vql.png
    """
    from jobs.inspection import draw, largest_row_bytes
    from models.checkpoint import open_checkpoint

    opened = open_checkpoint(checkpoint)
    _facts(opened, largest_row_bytes(opened) if opened.manifest.model == "vql" else None)
    if opened.manifest.diagnostics is not None:
        _diagnostics(opened.manifest.diagnostics)
    if plot is not None:
        draw(opened, plot)
        out.print(f"plot: {plot}", soft_wrap=True)


def _facts(opened: Checkpoint, row_bytes: int | None) -> None:
    manifest = opened.manifest
    sizes = manifest.sizes
    facts = {
        "checkpoint": opened.checkpoint_id,
        "model": manifest.model,
        "heads, groups, codewords": f"{sizes.heads}, {sizes.groups}, {sizes.codewords}",
        "widths: model, key, value": f"{sizes.width}, {sizes.key_width}, {sizes.value_width}",
        "half-lives by head, days": _days(manifest.half_life_ms),
        "window of recent events": str(sizes.window),
        "newest events attended one by one": str(sizes.newest),
        "actions": ", ".join(manifest.actions),
        "item fields": ", ".join(manifest.fields),
    }
    if manifest.context:
        context = manifest.context
        facts["item numbers, ranges"] = ", ".join(f"{name} {len(at) + 1}" for name, at in context.numbers.items())
        tags = (f"{name} {each.known:,}, {each.most} of an item" for name, each in context.tags.items())
        facts["item tags"] = "; ".join(tags)
        facts["item vectors, width"] = ", ".join(f"{name} {width}" for name, width in context.vectors.items())
    if manifest.category_field is not None:
        facts["code of group 0"] = manifest.fields[manifest.category_field]
    facts |= {f"training: {name}": str(value) for name, value in manifest.training.items()}
    if manifest.items_version is not UNSET:
        facts["training: items_version"] = str(manifest.items_version)
    facts |= {name: f"{value:g}" for name, value in manifest.metrics.items()}
    if row_bytes is not None:
        facts["largest row, counts apart, bytes"] = f"{row_bytes:,}"
    table = Table(show_header=False)
    for name, value in facts.items():
        table.add_row(name, value)
    out.print(table)


def _days(half_life_ms: Sequence[Sequence[float | None]]) -> str:
    return "  ".join(",".join("never" if h is None else f"{h / 86_400_000:.4g}" for h in head) for head in half_life_ms)


def _diagnostics(found: Diagnostics) -> None:
    groups = Table(title="codewords of each group", title_justify="left")
    for column in ("group", "used", "perplexity", "key error p50", "p99", "max"):
        groups.add_column(column, justify="right")
    for g, (usage, error) in enumerate(zip(found.usage, found.key_error, strict=True)):
        values = (usage.perplexity, error.p50, error.p99, error.max)
        groups.add_row(str(g), str(usage.used), *(f"{value:.4g}" for value in values))
    out.print(groups)
    lengths = Table(title="attention: exact against quantised weights", title_justify="left")
    for column in ("events", "mean", "p99", "bound"):
        lengths.add_column(column, justify="right")
    for each in found.attention:
        lengths.add_row(f"{each.length:,}", *(f"{value:.4f}" for value in (each.mean, each.p99, each.bound)))
    out.print(lengths)
