"""How far a backfill is: a line that moves on a terminal, log lines elsewhere, nothing for one that is soon over."""

from __future__ import annotations

import io
import time

from rich.console import Console
from structlog.testing import capture_logs

from jobs.backfill_progress import progress_shown


def test_log_lines_say_how_much_is_done_of_how_much() -> None:
    done = [(0, 0)]
    with capture_logs() as lines, progress_shown(lambda: done[0], 500, Console(file=io.StringIO()), 0.05):
        wait_for(lambda: len(lines) >= 1)
        done[0] = (3, 200)
        wait_for(lambda: lines[-1]["users"] == 3)
        done[0] = (7, 500)
    assert {line["event"] for line in lines} == {"backfilling"}
    said = [(line["users"], line["events"], line["of_events"]) for line in lines]
    assert (said[0], said[-1]) == ((0, 0, 500), (7, 500, 500))
    assert lines[-1]["events_per_s"] > 0


def test_a_backfill_that_is_soon_over_logs_nothing() -> None:
    with capture_logs() as lines, progress_shown(lambda: (1, 2), 2, Console(file=io.StringIO())):
        pass
    assert lines == []


def test_a_terminal_has_one_line_that_moves() -> None:
    out, done = io.StringIO(), [(0, 0)]
    with progress_shown(lambda: done[0], 2_000, Console(file=out, force_terminal=True, width=120)):
        done[0] = (1_234, 1_500)
        wait_for(lambda: "1,500 of 2,000 events, 1,234 users" in out.getvalue())
        done[0] = (1_300, 2_000)
    last = out.getvalue().split("backfill")[-1]
    assert "100%" in last
    assert "2,000 of 2,000 events, 1,300 users" in last


def wait_for(reached) -> None:
    deadline_s = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)
