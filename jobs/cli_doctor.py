"""`vql doctor`: what state the online store is in, and what is wrong with it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from jobs.cli_options import State

if TYPE_CHECKING:
    from feature_repo.condition import Condition

out = Console(highlight=False)


def doctor(
    state: State,
    checkpoint: Annotated[
        Path | None, typer.Option(resolve_path=True, help="A checkpoint that has to be served from this store.")
    ] = None,
) -> None:
    """Show the online store's kind, version, settings and checkpoints, and say what is wrong with it.

    The store is the one of VQL_REDIS_URL, else the embedded one in --state. Nothing is written. Each fault is a line
    with its remedy, and the exit code is then 5.

    Example: VQL_REDIS_URL=redis://cache:6379/0 vql doctor --state build/state
    """
    from feature_repo.condition import examine
    from feature_repo.handle import StoreHandle
    from models.checkpoint import open_checkpoint
    from models.errors import StoreError

    wanted = None if checkpoint is None else open_checkpoint(checkpoint).checkpoint_id
    found = examine(StoreHandle(state=state).open(), wanted)
    _show(found)
    for fault in found.faults:
        out.print(Text(f"wrong: {fault.what}; {fault.remedy}"), soft_wrap=True)
    if found.faults:
        raise typer.Exit(StoreError.exit_code)
    out.print("nothing is wrong")


def _show(found: Condition) -> None:
    facts = Table(show_header=False)
    for name, value in found.facts.items():
        facts.add_row(name, Text(value))
    out.print(facts)
    for each in found.checkpoints:
        positions = ", ".join(f"{p}: {epoch}:{offset}" for p, (epoch, offset) in sorted(each.positions.items()))
        record = each.backfill
        cut = record and ", ".join(f"{p}: {record.epoch}:{offset}" for p, offset in sorted(record.cut.items()))
        table = Table(title=f"checkpoint {each.checkpoint_id}", title_justify="left", show_header=False)
        table.add_row("rows", f"{each.rows:,}")
        table.add_row("positions (partition: epoch:offset)", positions or "none")
        table.add_row("backfill", "none" if record is None else f"{record.users:,} users, {record.events:,} events")
        table.add_row("its cut", cut or "none")
        out.print(table)
