"""A stream that is told to end reads no more, and ends in bounded time whatever hangs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from pipelines.drain import drained_by_signals
from pipelines.worker import stop_requested

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _not_told() -> None:
    stop_requested.clear()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_the_readers_to_stop_and_a_second_has_its_usual_effect(number: signal.Signals) -> None:
    usual = signal.getsignal(number)
    with drained_by_signals(60.0):
        os.kill(os.getpid(), number)
        assert stop_requested.wait(5)
        assert signal.getsignal(number) == usual
    stop_requested.clear()
    for thread in threading.enumerate():
        if thread.name == "drain":
            thread.join(5)
            assert not thread.is_alive(), "the watch of a drain that is done goes on"


def test_without_a_signal_nothing_is_changed() -> None:
    usual = signal.getsignal(signal.SIGTERM)
    with drained_by_signals(60.0):
        assert signal.getsignal(signal.SIGTERM) != usual
    assert signal.getsignal(signal.SIGTERM) == usual
    assert not stop_requested.is_set()


def test_what_hangs_is_given_up_with_one_line_and_the_stores_exit_code() -> None:
    program = (
        "import time; from jobs.logs import configure_logs; from pipelines.drain import drained_by_signals\n"
        "configure_logs('error')\n"
        "with drained_by_signals(0.3):\n    print('ready', flush=True)\n    time.sleep(60)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program], cwd=REPOSITORY, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGTERM)
        told_s = time.monotonic()
        _, err = process.communicate(timeout=30)
    assert process.returncode == 5
    assert time.monotonic() - told_s < 10
    (line,) = err.splitlines()
    assert '"event": "drain given up"' in line
    assert "start again" in line
