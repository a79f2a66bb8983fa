"""`vql size`: what a user's row takes, and millions of users in Redis."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from jobs.cli_options import integer
from models.errors import InputError

out = Console(highlight=False)


def size(
    checkpoint: Annotated[
        Path | None,
        typer.Option(resolve_path=True, help="Of whose sizes and items; if absent, the usual sizes and random codes."),
    ] = None,
    lengths: Annotated[
        str, typer.Option(help="Numbers of events, with commas between.")
    ] = "1,10,100,1000,10000,100000",
    mean_length: Annotated[
        float, typer.Option(help="Events per user of the mix, in the mean; the lengths are log-normal.")
    ] = 500.0,
    users: Annotated[
        str, typer.Option(help="Numbers of users of the mix, with commas between.")
    ] = "1000000,10000000,100000000",
    output: Annotated[Path | None, typer.Option(resolve_path=True, help="A JSON file to write.")] = None,
) -> None:
    """The bytes of a user's row by the number of events, and the memory of Redis for millions of users.

    Rows are made by the product's own fold, of random events, and put into a redis-server of one's own, whose memory is
    measured: of one copy, without replicas, fragmentation and the rewrite of its append-only file. Without redis-server
    it is computed. Takes half a minute.

    [b]fp32[/b]: the row as it is stored. [b]fp16[/b]: had it float16 means beside float32 masses, as a device has with
    vql serve --means float16. No row is stored so: its bytes are computed, and as many put.

    Example: vql size --checkpoint build/checkpoint --mean-length 2000 --users 25000000
    """
    from jobs.bench import write_figures
    from jobs.size import SizePlan, run_size, show

    plan = SizePlan(
        checkpoint=checkpoint,
        lengths=_numbers("--lengths", lengths),
        mean_length=mean_length,
        users=_numbers("--users", users),
    )
    figures = run_size(plan, out)
    show(figures, out)
    if output is not None:
        write_figures(output, figures)
        out.print(f"figures: {output}", soft_wrap=True)


def _numbers(option: str, text: str) -> list[int]:
    """Raises InputError naming the option."""
    found = [integer(option, number) for number in text.split(",")]
    if min(found) < 1:
        raise InputError(f"{option}: {min(found)} is below 1")
    return found
