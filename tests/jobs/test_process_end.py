"""A command's exit code is that of its work, whatever the interpreter's end would do."""

from __future__ import annotations

import subprocess
import sys
from textwrap import dedent

import pytest

# An object that aborts the process when the interpreter is taken to pieces, as a thread of Arrow may.
TORN = """
import atexit, os, sys
class Torn:
    def __del__(self, abort=os.abort):
        abort()
torn = Torn()
"""


def ended(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", TORN + dedent(code)], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["inspect", "nowhere"], 3), (["no-command"], 2)])
def test_a_command_ends_with_its_own_exit_code(arguments: list[str], code: int):
    ran = ended(f"from jobs.cli import process\nsys.argv = ['vql', *{arguments}]\nprocess()")
    assert ran.returncode == code, ran.stderr
    assert "vql" in ran.stdout + ran.stderr


def test_without_it_the_end_of_the_interpreter_decides():
    assert ended("from jobs.cli import main\nsys.argv = ['vql', '--help']\nmain()").returncode < 0


def test_what_a_command_has_registered_for_the_end_is_done():
    ran = ended(
        """
        from jobs.process_end import ended_at_once
        ended_at_once(lambda: atexit.register(print, 'stopped'))
        """
    )
    assert (ran.returncode, ran.stdout) == (0, "stopped\n")


def test_an_error_nobody_foresaw_is_one():
    ran = ended("from jobs.process_end import ended_at_once\nended_at_once(lambda: 1 / 0)")
    assert ran.returncode == 1
    assert "ZeroDivisionError" in ran.stderr
