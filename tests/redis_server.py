"""The product's local Redis for tests: a test is skipped where redis-server is not installed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jobs.local_servers import MEMORY_ONLY, RedisServer
from jobs.local_servers import running_redis as running
from tests.servers import missing

PERSISTENT = ("--save", "", "--appendonly", "yes", "--appendfsync", "always")


@contextmanager
def running_redis(
    folder: Path, options: Sequence[str] = MEMORY_ONLY, password: str | None = None, **more: Any
) -> Iterator[RedisServer]:
    """A server that answers; without redis-server the test is skipped, or fails if VQL_REQUIRE_SERVERS=1."""
    if shutil.which("redis-server") is None:
        missing("redis-server is not on the PATH: install Redis 6.2 or newer")
    with running(folder, options, password, **more) as server:
        yield server
