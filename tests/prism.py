"""Prism as a job service of its own, and a pool that starts its workers: what Flink's job server and its workers are.

Prism is Go: it is built once, at Beam's version, into the folder of the jars. Everything listens on a free port of
127.0.0.1 and ends, with what it started, when its context does.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from jobs.jars import cache_folder
from jobs.local_servers import free_ports
from tests.servers import missing

REPOSITORY = Path(__file__).parents[1]
BUILD_WAIT_S = 540.0
START_WAIT_S = 60.0
MODULE = "github.com/apache/beam/sdks/v2/go/cmd/prism"


@dataclass(frozen=True, kw_only=True, slots=True)
class JobService:
    """Where jobs are handed in, where their workers come from, and what both wrote."""

    port: int
    pool_port: int
    prism: subprocess.Popen[bytes]
    pool: subprocess.Popen[bytes]
    folder: Path

    @property
    def options(self) -> list[str]:
        """Beam's own options, as they follow the -- of `vql stream`."""
        return [
            "--runner=PortableRunner",
            f"--job_endpoint=127.0.0.1:{self.port}",
            "--environment_type=EXTERNAL",
            f"--environment_config=127.0.0.1:{self.pool_port}",
        ]

    def workers(self) -> list[int]:
        """The process ids of the pool's workers."""
        found = subprocess.run(["pgrep", "-P", str(self.pool.pid)], capture_output=True, text=True, check=False)
        return [int(pid) for pid in found.stdout.split()]

    def kill(self) -> None:
        """Kill -9 everything at once."""
        for process in (self.prism, self.pool):
            _kill(process)

    def said(self) -> str:
        """What the service, the pool and its workers wrote."""
        return "".join(path.read_text(errors="replace") for path in sorted(self.folder.glob("*.out")))


def prism_binary() -> Path:
    """Prism at Beam's version, built on first use (two minutes). Skips without Go; fails if servers are required."""
    version = importlib.metadata.version("apache-beam")
    binary = cache_folder() / f"prism-{version}" / "prism"
    if binary.exists():
        return binary
    go = shutil.which("go") or shutil.which("go", path="/usr/local/go/bin")
    if go is None:
        missing("Prism is built with Go, and there is no go on PATH")
    building = binary.parent.with_name(f"{binary.parent.name}-{os.getpid()}")
    done = subprocess.run(
        [go, "install", f"{MODULE}@v{version}"],
        env=os.environ | {"GOBIN": str(building)},
        capture_output=True,
        text=True,
        timeout=BUILD_WAIT_S,
        check=False,
    )
    if done.returncode:
        missing(f"Prism {version} could not be built: {done.stderr.strip().splitlines()[-1:]}")
    # Two processes may build at once: the last rename wins, and both results are the same.
    binary.parent.mkdir(parents=True, exist_ok=True)
    (building / "prism").replace(binary)
    building.rmdir()
    return binary


@contextmanager
def running_job_service(folder: Path) -> Iterator[JobService]:
    """A job service and a worker pool that answer, for as long as the context lasts."""
    folder.mkdir(parents=True, exist_ok=True)
    port, pool_port = free_ports(2)
    prism = [str(prism_binary()), f"--job_port={port}", "--serve_http=false", "--log_kind=json"]
    pool = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main", f"--service_port={pool_port}"]
    with (
        _running(prism, folder / "prism.out", port) as prism_process,
        _running(pool, folder / "pool.out", pool_port) as pool_process,
    ):
        yield JobService(port=port, pool_port=pool_port, prism=prism_process, pool=pool_process, folder=folder)


@contextmanager
def _running(command: Sequence[str], output: Path, port: int) -> Iterator[subprocess.Popen[bytes]]:
    # The pool starts its workers as plain `python`, in its own folder.
    environment = os.environ | {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    with output.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=file, cwd=output.parent, env=environment, start_new_session=True
        )
    try:
        _wait_until_it_listens(process, port, output)
        yield process
    finally:
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    # It has a session of its own, so that the pool's workers end with it, also when it has ended before them.
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _wait_until_it_listens(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    deadline_s = time.monotonic() + START_WAIT_S
    while True:
        with socket.socket() as asked:
            if asked.connect_ex(("127.0.0.1", port)) == 0:
                return
        if process.poll() is not None or time.monotonic() > deadline_s:
            raise AssertionError(f"{output.stem} does not listen at {port}:\n{output.read_text()}")
        time.sleep(0.05)
