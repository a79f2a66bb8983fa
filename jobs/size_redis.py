"""What a row takes in Redis: measured in a server of one's own, or, where none is installed, computed.

A row takes more there than its bytes: the allocator rounds each string up, and beside them are the row's hash, its key
and stamp, and the user's place in the index of users. Measured is the growth of used_memory when as many users again
are put by the product's own store; so what a server takes without rows does not count. Nor do replicas, the rewrite of
an append-only file and fragmentation, which are for whoever plans the server to add.
"""

from __future__ import annotations

import itertools
import math
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from feature_repo.store import RowPut
from jobs.local_servers import MEMORY_ONLY, RedisServer, require_redis, running_redis
from models.errors import MachineError
from models.row import RowBytes
from models.wire import Stamp

# As many users twice: fewer where their rows are larger than this together, but each row once.
USERS, BYTES = 1_000, 128 << 20
USER_ID = "user-{:011d}"
# An index of millions of users is a skip list in each shard; that of a thousand would be a compact list.
AS_OF_MANY_USERS = ("--zset-max-ziplist-entries", "0")
CLOSE_WAIT_S = 10.0
# Of a user, besides the two parts of the row: key, hash, stamp, place in the index. Measured on Redis 7.0.
BESIDE_THE_ROW_BYTES = 564


def installed_redis() -> str | None:
    """The version of the redis-server on the PATH."""
    if shutil.which("redis-server") is None:
        return None
    said = subprocess.run([require_redis(), "--version"], capture_output=True, text=True, check=False).stdout
    found = re.search(r"v=(\S+)", said)
    return found[1] if found else "unknown"


def measured_bytes(checkpoint_id: str, rows: Sequence[RowBytes]) -> float:
    """Memory per user of a server that is started for it, when users have these rows, each of them equally many.

    Raises MachineError where redis-server is missing or does not answer, StoreError where it refuses the rows.
    """
    rounds = min(USERS / len(rows), BYTES / sum(row.size_bytes for row in rows))
    users = max(1, math.ceil(rounds)) * len(rows)
    options = (*MEMORY_ONLY, *AS_OF_MANY_USERS)
    with tempfile.TemporaryDirectory(prefix="vql-size-") as name, running_redis(Path(name), options) as server:
        before, after = (_filled(server, checkpoint_id, rows, range(n, n + users)) for n in (0, users))
    return (after - before) / users


def _filled(server: RedisServer, checkpoint_id: str, rows: Sequence[RowBytes], numbers: Iterable[int]) -> int:
    """The server's used_memory after users of these numbers were put."""
    # Of the environment only the time to live counts; the server has no password.
    settings = RedisSettings(url=server.url, username=None, password_file=None, ssl_ca_file=None)
    stamp = Stamp(epoch=1, partition=0, offset=0)
    puts = [
        RowPut(user_id=USER_ID.format(n), stamp=stamp, recent=row.recent, folded=row.folded)
        for n, row in zip(numbers, itertools.cycle(rows), strict=False)
    ]
    store = RedisRows(settings)
    store.put_rows(checkpoint_id, puts)
    store.close()
    with server.client() as client:
        # The buffers of the connection that put them go with it.
        deadline_s = time.monotonic() + CLOSE_WAIT_S
        while client.info("clients")["connected_clients"] > 1:
            if time.monotonic() > deadline_s:
                raise MachineError(f"redis-server still serves another client after {CLOSE_WAIT_S:g} s; try again")
            time.sleep(0.01)
        return client.info("memory")["used_memory"]


def computed_bytes(rows: Sequence[RowBytes]) -> float:
    """About what `measured_bytes` gives: the two strings as the allocator rounds them, and what is beside them."""
    return BESIDE_THE_ROW_BYTES + sum(_allocated(row.recent) + _allocated(row.folded) for row in rows) / len(rows)


def _allocated(data: bytes) -> int:
    """What jemalloc, the allocator of Redis, sets aside for a string with its head: sizes a fourth of a doubling apart
    (its manual, "size classes")."""
    size = len(data) + (4 if len(data) < 2**8 else 6 if len(data) < 2**16 else 10)
    step = max(16, 1 << ((size - 1).bit_length() - 3))
    return -(-size // step) * step
