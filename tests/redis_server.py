"""A real Redis server for tests: one process on 127.0.0.1 and a free port, ended by its id.

It keeps nothing on disk unless asked to, and can be ended and started again at the same address.
"""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import redis

from tests.servers import free_port, missing

START_WAIT_S = 20.0
MEMORY_ONLY = ("--save", "", "--appendonly", "no")
PERSISTENT = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")


@dataclass
class RedisServer:
    """A server at a fixed address, running or not."""

    folder: Path
    port: int
    options: Sequence[str] = MEMORY_ONLY
    password: str | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client of the test's own, beside the store."""
        return redis.Redis(host="127.0.0.1", port=self.port, password=self.password, socket_timeout=START_WAIT_S)

    def start(self) -> None:
        output = self.folder / "redis.out"
        named = ["--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder), "--loglevel", "warning"]
        secret = [] if self.password is None else ["--requirepass", self.password]
        with output.open("ab") as file:
            command = [require_redis(), *named, *secret, *self.options]
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        deadline_s = time.monotonic() + START_WAIT_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.ConnectionError as error:
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    raise AssertionError(f"redis-server does not answer ({error}):\n{output.read_text()}") from error
                time.sleep(0.02)

    def stop(self) -> None:
        """End it in good order, or not at all politely if it does not listen."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(START_WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


@contextmanager
def running_redis(
    folder: Path, options: Sequence[str] = MEMORY_ONLY, password: str | None = None
) -> Iterator[RedisServer]:
    """A server that answers, for as long as the context lasts. Skips the test where redis-server is not installed."""
    require_redis()
    server = RedisServer(folder=folder, port=free_port(), options=options, password=password)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def require_redis() -> str:
    """The path of redis-server; where there is none, the test is skipped, or fails if VQL_REQUIRE_SERVERS=1."""
    path = shutil.which("redis-server")
    if path is None:
        missing("redis-server is not on the PATH: install Redis 6.2 or newer")
    return path
