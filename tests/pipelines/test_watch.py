"""Progress: the first figures of a stream, as a log line and as a line on a terminal."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from feature_repo.handle import StoreHandle
from pipelines import watch
from pipelines.health import Health
from pipelines.metrics import StreamMetrics
from pipelines.update import UpdateCounts
from pipelines.watch import Pace, Status, Watch, watched

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def metrics() -> StreamMetrics:
    made = StreamMetrics()
    made.begin({0: -1, 1: -1})
    return made


def health_of(metrics: StreamMetrics, state: Path) -> Health:
    return Health(metrics=metrics, store=StoreHandle(state=state), checkpoint_id="ab" * 16, started_s=time.time())


def test_a_status_has_the_rate_since_the_last_one_and_the_worst_lag(metrics: StreamMetrics) -> None:
    metrics.observe(UpdateCounts(events_folded=1_000_000))
    pace = Pace(metrics)
    assert pace.status().lag_events is None
    metrics.observe(UpdateCounts(events_folded=100))
    metrics.dead_letters(["json"])
    for partition, end in ((0, 9), (1, 4)):
        metrics.log_end(partition, end)
    metrics.committed(1, 4)
    time.sleep(0.05)
    status = pace.status()
    assert 0 < status.events_per_s <= 101 / 0.05
    assert (status.lag_events, status.dead_letters) == (10, 1)
    assert status.lag_s >= 0
    assert status.last_commit_age_s is not None


def test_a_status_reads_as_one_line() -> None:
    known = Status(events_per_s=12_345, lag_events=6_789, lag_s=1.5, last_commit_age_s=0.4, dead_letters=3)
    assert known.line() == "12,345 events/s   lag 6,789 events, 1.5 s   commit 0.4 s ago   3 dead letters"
    unknown = Status(events_per_s=0, lag_events=None, lag_s=0.0, last_commit_age_s=None, dead_letters=0)
    assert unknown.line() == "0 events/s   lag unknown   no commit yet   0 dead letters"


def test_progress_is_logged_as_fields_while_it_lasts(
    metrics: StreamMetrics, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PROGRESS_INTERVAL_S", 0.02)
    with capture_logs() as lines, watched(Watch(port=0), health_of(metrics, tmp_path)):
        time.sleep(0.3)
    assert lines[0]["event"] == "metrics served"
    assert lines[0]["port"] > 0
    assert {"event", "events_per_s", "lag_events", "lag_s", "dead_letters"} <= lines[1].keys()
    count = len(lines)
    time.sleep(0.1)
    assert len(lines) == count


def test_a_terminal_has_one_line_that_changes_and_log_lines_above_it(tmp_path: Path) -> None:
    program = (
        "import time; from pathlib import Path; import structlog; from jobs.logs import configure_logs\n"
        "from feature_repo.handle import StoreHandle; from pipelines.health import Health\n"
        "from pipelines.metrics import StreamMetrics; from pipelines.watch import Watch, watched\n"
        "configure_logs('info'); metrics = StreamMetrics(); metrics.begin({0: -1}); metrics.log_end(0, 41)\n"
        f"health = Health(metrics=metrics, store=StoreHandle(state=Path({str(tmp_path)!r})), checkpoint_id='a' * 32, "
        "started_s=0.0)\n"
        "with watched(Watch(live=True), health):\n"
        "    structlog.get_logger().info('something happened', partition=3); time.sleep(1.2)\n"
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        stderr=theirs,
        stdout=subprocess.DEVNULL,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "120", "PYTHONPATH": ""},
    )
    os.close(theirs)
    shown = _read_all(ours)
    assert process.wait(60) == 0, shown
    assert "lag 42 events" in shown
    assert "no commit yet" in shown
    assert "something happened" in shown
    assert '"event"' not in shown, "a terminal gets lines for people"


def _read_all(terminal: int) -> str:
    shown = b""
    while True:
        try:
            more = os.read(terminal, 4096)
        except OSError:  # how Linux says that the other side of a terminal is closed
            more = b""
        if not more:
            os.close(terminal)
            return shown.decode()
        shown += more
