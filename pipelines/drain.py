"""How a stream ends when it is told to: it reads no more, finishes its bundle, commits, and does so in bounded time."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import structlog

from models.errors import StoreError
from pipelines.worker import stop_requested


@contextmanager
def drained_by_signals(limit_s: float) -> Iterator[None]:
    """SIGTERM and SIGINT end the readers of this process; a second one has its usual effect.

    A bundle that is not done limit_s later (its store hangs) is given up: the process ends with StoreError's exit
    code. That is as safe as a kill: what was not put was not committed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    usual = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    drained = threading.Event()

    def restore() -> None:
        for number, action in usual.items():
            signal.signal(number, action)

    def end(number: int, _frame: object) -> None:
        stop_requested.set()
        restore()
        # In a thread, because the signal may have come in the middle of a log line.
        threading.Thread(target=_give_up_after, args=(limit_s, drained, number), name="drain", daemon=True).start()

    for number in usual:
        signal.signal(number, end)
    try:
        yield
    finally:
        drained.set()
        restore()


def _give_up_after(limit_s: float, drained: threading.Event, number: int) -> None:
    log = structlog.get_logger()
    log.info("stream drains", signal=signal.Signals(number).name, limit_s=limit_s)
    if drained.wait(limit_s):
        return
    log.error("drain given up", limit_s=limit_s, remedy="start again; what was not put was not committed")
    logging.shutdown()
    os._exit(StoreError.exit_code)
