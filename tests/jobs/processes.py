"""Commands of `vql` as processes of their own, and a kill -9 that reaches all they started."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

KILL_WAIT_S = 300.0
OUTPUT = "vql.out"


def start(arguments: Sequence[object], cwd: Path) -> subprocess.Popen[bytes]:
    """`vql` with these arguments; what it prints is added to OUTPUT in cwd."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments)]
    with (cwd / OUTPUT).open("ab") as output:
        return subprocess.Popen(command, cwd=cwd, stdout=output, stderr=output)


def kill_when(process: subprocess.Popen[bytes], reached: Callable[[], bool]) -> None:
    """Kill -9 the process and its descendants as soon as `reached`; it must not have ended before."""
    try:
        wait_until(process, reached)
    finally:
        kill(process)


def wait_until(process: subprocess.Popen, reached: Callable[[], bool]) -> None:
    """Wait for a process that must not end before."""
    deadline = time.monotonic() + KILL_WAIT_S
    while not reached():
        assert process.poll() is None, f"ended with {process.returncode} before what was waited for"
        assert time.monotonic() < deadline, "never got as far"
        time.sleep(0.005)


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill -9 the process and its descendants, also those in sessions of their own."""
    family = [process.pid]
    for pid in family:
        family += [child for child, parent in _parents().items() if parent == pid]
    for pid in family:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    process.wait()
    for pid in family:
        while _status(Path(f"/proc/{pid}")).get("State", "Z")[0] not in "ZX":
            time.sleep(0.01)


def _parents() -> dict[int, int]:
    """The parent of every process."""
    found = ((int(path.name), _status(path).get("PPid")) for path in Path("/proc").glob("[0-9]*"))
    return {pid: int(parent) for pid, parent in found if parent is not None}


def _status(process: Path) -> dict[str, str]:
    try:
        lines = (process / "status").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}
