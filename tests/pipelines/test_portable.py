"""What a job service says of a worker becomes the worker's error again. With real ones: test_job_service.py."""

from __future__ import annotations

import pytest

from models.errors import ForeignRowError, MachineError, StoreError, VqlError, WireError
from pipelines.portable import worker_error

STACK = """bundle inst002 stage-002 failed:Traceback (most recent call last):
  File "sqlite_store.py", line 25, in put_rows
sqlite3.OperationalError: disk I/O error

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "update.py", line 72, in update_rows
{last}
"""


@pytest.mark.parametrize(
    ("last", "kind", "words"),
    [
        ("models.errors.StoreError: no: [while] [while running 'Update']", StoreError, "no: [while]"),
        ("models.errors.WireError: torn", WireError, "torn"),
        ("models.errors.ForeignRowError: theirs [while running 'Update']", ForeignRowError, "theirs"),
        ("ImportError: no such name", MachineError, "the workers cannot import what they run (no such name)"),
        ("bundle inst001: SDK worker disconnected", MachineError, "a worker ended in the middle of its work"),
        ("panic in stage.Execute: send on closed channel", MachineError, "a worker ended in the middle of its work"),
        ("KeyError: 'x' [while running 'Parse']", VqlError, "the job failed: KeyError: 'x'"),
        ("models.errors.NewerError: what", VqlError, "the job failed: models.errors.NewerError: what"),
    ],
)
def test_the_text_of_a_worker_is_its_error_again(last: str, kind: type[VqlError], words: str) -> None:
    error = worker_error(STACK.format(last=last))

    assert type(error) is kind
    assert str(error).startswith(words)
    assert "\n" not in str(error)


def test_a_job_that_failed_without_a_word_is_still_a_line() -> None:
    assert str(worker_error("")).startswith("the job failed: no reason given")
