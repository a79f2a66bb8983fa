"""The end of a process: when all is done, and not after the interpreter was taken to pieces.

Threads of Arrow that are about to end when it is abort the process (apache/arrow, issues 34314 and 39862): a command
that had done its work then ended with SIGABRT, and whoever had scheduled it took it for failed.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import suppress


def ended_at_once(run: Callable[[], None]) -> None:
    """Run it; the process ends with its exit code after what is registered with `atexit` meanwhile."""
    code = 1

    def end() -> None:
        for stream in (sys.stdout, sys.stderr):
            # Nobody reads any more, or it was closed.
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)

    # What was registered first comes last.
    atexit.register(end)
    try:
        run()
        code = 0
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        raise
