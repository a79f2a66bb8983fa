"""What a command of `vql` said, and the one line that an error is to be."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import structlog

TALKATIVE = ("apache_beam", "feast", "py4j", "urllib3")


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    code: int
    out: str
    err: str


def assert_one_line(said: Said, code: int, *words: str) -> None:
    assert said.code == code, said
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("vql: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err


@contextmanager
def logs_put_back() -> Iterator[None]:
    """What a command does to the logs of its process is undone: the next test's are not its."""
    root = logging.getLogger()
    handlers, filters, level = root.handlers[:], root.filters[:], root.level
    levels = {name: logging.getLogger(name).level for name in TALKATIVE}
    try:
        yield
    finally:
        root.handlers[:], root.filters[:] = handlers, filters
        root.setLevel(level)
        logging.captureWarnings(False)
        structlog.reset_defaults()
        for name, before in levels.items():
            logging.getLogger(name).setLevel(before)
