"""The log lines of a long-running command: JSON for machines, colours for people; one way for every library's.

A line is an event and its fields, with time (ISO, UTC), level and logger. Beam's and Kafka's own loggers, and
Python's warnings, go the same way. Lines go to standard error, for standard output holds a command's answer.
"""

from __future__ import annotations

import logging
import sys
from typing import TextIO

import structlog
from structlog.typing import Processor

from models.errors import InputError

LEVELS = ("debug", "info", "warning", "error")
# Libraries that tell at INFO how they work inside.
_TALKATIVE = ("apache_beam", "feast", "py4j", "urllib3")


class _StandardError(logging.StreamHandler):
    """Writes to what standard error is now: a live status line puts itself in its place for a while."""

    @property
    def stream(self) -> TextIO:
        return sys.stderr

    @stream.setter
    def stream(self, _stream: TextIO) -> None:
        pass


def configure_logs(level: str) -> None:
    """Once per process. Raises InputError for a level that there is not."""
    if level not in LEVELS:
        raise InputError(f"--log-level: {level!r} is none of {', '.join(LEVELS)}")
    for_people = sys.stderr.isatty()
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
    ]
    structlog.configure(
        processors=[structlog.stdlib.filter_by_level, *shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
    )
    render: list[Processor] = (
        [structlog.dev.ConsoleRenderer(timestamp_key="time")]
        if for_people
        else [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(default=str)]
    )
    written = _StandardError()
    written.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=[*shared, structlog.stdlib.ExtraAdder()],
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *render],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [written]
    # Said by Beam at each import, about clients of Google's cloud that nothing here uses.
    root.addFilter(lambda record: not record.getMessage().startswith("apitools not found"))
    root.setLevel(level.upper())
    for name in _TALKATIVE:
        logging.getLogger(name).setLevel(logging.DEBUG if level == "debug" else logging.WARNING)
    logging.captureWarnings(True)
