"""How far a backfill is, while it runs: a line that moves on a terminal, else a log line now and then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S, LOG_EVERY_S = 0.5, 10.0
Counted = Callable[[], tuple[int, int]]
Show = Callable[[int, int], None]


@contextmanager
def progress_shown(
    counted: Counted, expected: int, console: Console | None = None, log_every_s: float = LOG_EVERY_S
) -> Iterator[None]:
    """While the context lasts, show what `counted` tells, (users, events) done, of so many events expected.

    console: standard error, if none is given.
    """
    console = Console(stderr=True) if console is None else console
    if console.is_terminal:
        with _line(console, expected) as show, _repeated(counted, show, LINE_EVERY_S):
            yield
    else:
        with _repeated(counted, _log_lines(expected), log_every_s):
            yield


@contextmanager
def _line(console: Console, expected: int) -> Iterator[Show]:
    words = TextColumn("{task.completed:,.0f} of {task.total:,.0f} events, {task.fields[users]:,} users")
    columns = (
        TextColumn("backfill"),
        BarColumn(),
        TaskProgressColumn(),
        words,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=expected, users=0)

        def show(users: int, events: int) -> None:
            progress.update(task, completed=events, users=users)

        yield show


def _log_lines(expected: int) -> Show:
    log, began_s = structlog.get_logger(), time.monotonic()

    def show(users: int, events: int) -> None:
        passed_s = time.monotonic() - began_s
        log.info("backfilling", users=users, events=events, of_events=expected, events_per_s=round(events / passed_s))

    return show


@contextmanager
def _repeated(counted: Counted, show: Show, every_s: float) -> Iterator[None]:
    """Show it every so often from another thread, and once more at the end of a good run that was shown before."""
    ended, shown = threading.Event(), False

    def repeat() -> None:
        nonlocal shown
        while not ended.wait(every_s):
            show(*counted())
            shown = True

    thread = threading.Thread(target=repeat, name="backfill-progress", daemon=True)
    thread.start()
    try:
        yield
        if shown:
            show(*counted())
    finally:
        ended.set()
        thread.join()
