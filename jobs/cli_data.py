"""The commands `vql data list` and `vql data prepare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.cli_options import LOCAL, Log, Master, choice, pairs

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="Public data sets: which there are ([b]list[/b]), and one of them to a log ([b]prepare[/b]).\n\n"
    "After that: vql train --log DIR --field FIELD ..., as with any log.",
)
out = Console(highlight=False)


@app.command("list")
def list_() -> None:
    """Show each data set: what it is, its files as published and their roles, its item fields, its protocols."""
    from jobs.datasets import DATASETS

    for data in DATASETS.values():
        files = ", ".join(f"{file.name} ({role})" for role, file in data.files.items())
        out.print(f"[b]{data.name}[/b]  {data.about}")
        out.print(f"  files      {files}", markup=False, soft_wrap=True)
        out.print(f"  fields     {', '.join(name for name in data.item_columns if name != 'item_id')}")
        out.print(f"  protocols  {', '.join(data.protocols)}")
        out.print(f"  terms      {data.terms}", markup=False)


@app.command()
def prepare(
    name: Annotated[str, typer.Argument(help="A data set of vql data list.")],
    log: Log,
    path: Annotated[
        Path | None,
        typer.Option(resolve_path=True, help="The folder with its files; not needed for completejourney."),
    ] = None,
    file: Annotated[list[str], typer.Option(help="ROLE=NAME of a file that has another name; repeatable.")] = [],
    column: Annotated[
        list[str], typer.Option(help="FIELD=SQL expression over the events file's columns, in place of its own.")
    ] = [],
    item_column: Annotated[
        list[str], typer.Option(help="FIELD=SQL expression over the items file's columns, in place of its own.")
    ] = [],
    where: Annotated[str, typer.Option(help="SQL condition: which rows to take, of a part of the users say.")] = "true",
    partitions: Annotated[int, typer.Option(min=1, help="Partitions of a new log; an existing one keeps its own.")] = 4,
    master: Master = LOCAL,
) -> None:
    """Make a log of a data set's files as published: its events, and its items with their static fields.

    Running it again appends nothing twice. Rows that are no events go to the table quarantine with the reason.

    Example: vql data prepare kuairec_small --path KuaiRec/data --log build/kuairec

    MovieLens-like files: vql data prepare movielens --path shop --log build/shop --file events=buys.csv
    --file items=products.csv --column user_id=customer --column item_id=sku --column "event_id=concat(order, sku)"
    --column "event_time_ms=unix_millis(to_timestamp(bought_at))" --column "action='purchase'"
    --item-column item_id=sku --item-column category=kind --item-column tags=labels
    """
    from jobs.datasets import DATASETS
    from jobs.datasets.dataset import prepare as run
    from jobs.ingest import NewLog
    from jobs.spark import open_spark

    published = DATASETS[choice("NAME", name, tuple(DATASETS))]
    item_shape = "--item-column: FIELD=EXPRESSION"
    data = published.altered(pairs(file, "--file: ROLE=NAME"), pairs(column), pairs(item_column, item_shape))
    data.find(path)
    done = run(open_spark(master), data, path, log, where, NewLog(partitions=partitions))
    out.print(
        f"{done.events.read:,} rows read: {done.events.appended:,} events appended, {done.events.already:,} already in "
        f"the log, {done.events.quarantined:,} quarantined; {done.items:,} items",
        soft_wrap=True,
    )
