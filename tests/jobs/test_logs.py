"""Log lines: JSON with the same fields whoever logs."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
import structlog

from jobs.logs import configure_logs
from models.errors import InputError
from tests.jobs.commands import logs_put_back

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _put_back() -> Iterator[None]:
    with logs_put_back():
        yield


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict]:
    printed = capsys.readouterr()
    assert printed.out == ""
    return [json.loads(line) for line in printed.err.splitlines()]


def test_a_line_is_an_event_with_fields_time_level_and_logger(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info")
    structlog.get_logger("vql.x").info("stream starts", partition=3, path=Path("/a"))
    (line,) = lines(capsys)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(line.pop("time"))).total_seconds()) < 60
    assert line == {"event": "stream starts", "partition": 3, "path": "/a", "level": "info", "logger": "vql.x"}


def test_other_libraries_lines_go_the_same_way(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info")
    logging.getLogger("vql.kafka").error("broker %s went away", "b:1")
    logging.getLogger("apache_beam.runners").warning("odd")
    logging.getLogger("apache_beam.runners").info("how it works inside")
    found = lines(capsys)
    assert [(line["event"], line["level"], line["logger"]) for line in found] == [
        ("broker b:1 went away", "error", "vql.kafka"),
        ("odd", "warning", "apache_beam.runners"),
    ]
    assert all("time" in line for line in found)


def test_a_stack_is_part_of_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("info")
    try:
        raise ValueError("odd")
    except ValueError:
        logging.getLogger("x").exception("failed")
    (line,) = lines(capsys)
    assert line["exception"][0]["exc_type"] == "ValueError"


def test_a_level_hides_what_is_below_it(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logs("warning")
    structlog.get_logger().info("hidden")
    structlog.get_logger().warning("shown")
    assert [line["event"] for line in lines(capsys)] == ["shown"]


def test_a_level_that_there_is_not_is_named() -> None:
    with pytest.raises(InputError, match="--log-level: 'loud' is none of debug, info, warning, error"):
        configure_logs("loud")


def test_a_warning_of_python_is_a_line_too() -> None:
    program = "import warnings; from jobs.logs import configure_logs; configure_logs('info'); warnings.warn('old way')"
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    (line,) = map(json.loads, done.stderr.splitlines())
    assert (line["level"], line["logger"], "old way" in line["event"]) == ("warning", "py.warnings", True)
