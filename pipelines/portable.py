"""Running a pipeline to its end on any runner, above all on those whose workers are other processes.

The in-process runner raises what a step raised. A job service (Prism's, Flink's) hands back text: the worker's whole
stack, or that the worker is gone. Here that text becomes an error of this product again: one line, its exit code.
A signal reaches this process and not the workers, so the job is cancelled; that is as safe as killing it.
"""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import apache_beam as beam
import grpc
from apache_beam.options.pipeline_options import PortableOptions
from apache_beam.runners.portability import portable_runner
from apache_beam.runners.runner import PipelineResult, PipelineState

from models.errors import EventError, MachineError, VqlError
from pipelines.worker import stop_requested

STOP_POLL_S = 0.2
READ_WAIT_S = 10.0
_OURS = re.compile(r"^models\.errors\.(\w+): (.*?)(?: \[while running '[^']*'\])?$", re.MULTILINE)
_IMPORT = re.compile(r"^(?:ModuleNotFoundError|ImportError): (.*?)(?: \[while running '[^']*'\])?$", re.MULTILINE)
# What Prism says of a worker that disconnects; the second, when it does while a bundle is handed to it.
_WORKER_GONE = ("SDK worker disconnected", "send on closed channel")
# Beam's thread for the messages of a job; it may outlive the wait for the job by a moment.
_READING = "wait_until_finish_read"


def run_job(pipeline: beam.Pipeline) -> PipelineResult:
    """Run to the end, or until `stop_requested`.

    Raises what a step raised, as itself; MachineError when the job service or a worker is not there, or went away;
    VqlError for anything else that ended the job. The whole text is the cause, and in the workers' logs.
    """
    asked = pipeline.options.view_as(PortableOptions)
    try:
        with _text_only_raised():
            result = pipeline.run()
            with _cancelled_when_told(result, asked.environment_type):
                result.wait_until_finish()
    except RuntimeError as error:
        # A cancelled job, too, is an error to Beam.
        if stop_requested.is_set() and result.state == PipelineState.CANCELLED:
            return result
        raise worker_error(str(error)) from error
    except (grpc.RpcError, grpc.FutureTimeoutError) as error:
        raise MachineError(
            f"the job service at {asked.job_endpoint} does not answer, or went away: see that it runs, and that it "
            f"reaches the workers at {asked.environment_config}; then start again, the rows are sound"
        ) from error
    return result


def worker_error(text: str) -> VqlError:
    """The error that a job service's text tells of: of the last of the stacks in it, for that one was not caught."""
    kinds = {kind.__name__: kind for kind in _kinds(VqlError) if kind is not EventError}
    if ours := [(name, words) for name, words in _OURS.findall(text) if name in kinds]:
        name, words = ours[-1]
        return kinds[name](words)
    if missing := _IMPORT.findall(text):
        return MachineError(f"the workers cannot import what they run ({missing[-1]}): install vql there as here")
    if any(words in text for words in _WORKER_GONE):
        return MachineError(
            "a worker ended in the middle of its work (killed, or out of memory?); start again, the rows are sound"
        )
    last = next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "no reason given")
    return VqlError(f"the job failed: {last}; the logs of its workers say more")


def _kinds(kind: type[VqlError]) -> Iterator[type[VqlError]]:
    yield kind
    for below in kind.__subclasses__():
        yield from _kinds(below)


@contextmanager
def _cancelled_when_told(result: PipelineResult, environment_type: str | None) -> Iterator[None]:
    """Cancel the job when a stop is requested, unless its readers are in this process: these end by themselves."""
    if not isinstance(result, portable_runner.PipelineResult) or environment_type == "LOOPBACK":
        yield
        return
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(STOP_POLL_S):
            if stop_requested.is_set():
                result.cancel()
                return

    watching = threading.Thread(target=watch, name="cancel when told", daemon=True)
    watching.start()
    try:
        yield
    finally:
        ended.set()
        watching.join()


@contextmanager
def _text_only_raised() -> Iterator[None]:
    """Keep Beam from also writing the stack that is raised: in its log, and as the end of its reading thread."""
    usual, root = threading.excepthook, logging.getLogger()

    def hook(arguments: threading.ExceptHookArgs) -> None:
        if not issubclass(arguments.exc_type, grpc.RpcError):
            usual(arguments)

    def keep(record: logging.LogRecord) -> bool:
        return record.module != "portable_runner" or record.levelno < logging.ERROR

    root.addFilter(keep)
    threading.excepthook = hook
    try:
        yield
    finally:
        for thread in threading.enumerate():
            if thread.name == _READING:
                thread.join(READ_WAIT_S)
        threading.excepthook = usual
        root.removeFilter(keep)
