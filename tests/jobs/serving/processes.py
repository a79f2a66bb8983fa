"""`vql serve` as a process of its own on a free port, and clients that load it."""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

from jobs.serving.client import RankClient
from tests.servers import get

Found = TypeVar("Found")
START_WAIT_S = 120.0
ROOT = Path(__file__).parents[3]


@dataclass(kw_only=True)
class Server:
    """A running server. log: its standard error, JSON lines."""

    process: subprocess.Popen[bytes]
    log: Path
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def rank(self, candidates: dict[str, list[str]], now_ms: int) -> dict[str, Any]:
        client = RankClient(self.url, timeout_s=30)
        try:
            return client.rank(candidates, now_ms)
        finally:
            client.close()

    def post(self, body: bytes, headers: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
        """Status and JSON body, on a connection of its own."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request("POST", "/rank", body, {"Content-Type": "application/json"} | (headers or {}))
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def get(self, path: str) -> tuple[int, str]:
        return get(self.url + path)

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()]

    def wait_for(self, event: str) -> dict[str, Any]:
        """The first log line of this event."""
        return wait_until(lambda: next((line for line in self.lines() if line["event"] == event), None))

    def rss_mb(self) -> float:
        return psutil.Process(self.process.pid).memory_info().rss / 2**20


@contextmanager
def serving(
    checkpoint: Path, state: Path, *options: object, redis_url: str = "", deadline_ms: float = 10_000
) -> Iterator[Server]:
    """Killed with the context if it still runs. A busy machine misses no such deadline: what is read is fresh."""
    log = state / "serve.err"
    command = [sys.executable, "-m", "jobs.cli", "serve", "--checkpoint", str(checkpoint), "--state", str(state)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "VQL_REDIS_URL": redis_url}
    with log.open("wb") as err:
        process = subprocess.Popen(
            [*command, "--port", "0", "--deadline-ms", str(deadline_ms), *map(str, options)],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=err,
        )
    try:
        deadline_s = time.monotonic() + START_WAIT_S
        while b'"serving"' not in log.read_bytes():
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline_s, log.read_text()
            time.sleep(0.05)
        server = Server(process=process, log=log, port=0)
        server.port = server.wait_for("serving")["port"]
        yield server
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def wait_until(found: Callable[[], Found | None], seconds: float = 30.0) -> Found:
    deadline_s = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)
    return value


@dataclass(kw_only=True)
class Load:
    """What clients saw so far: every answer's status and body, seconds of each, and requests without an answer."""

    answers: list[tuple[int, dict[str, Any]]] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    lost: list[Exception] = field(default_factory=list)

    @property
    def statuses(self) -> Counter[int]:
        return Counter(status for status, _ in self.answers)


@contextmanager
def load(server: Server, bodies: Sequence[bytes], clients: int = 8) -> Iterator[Load]:
    """Clients that send the bodies in turn, each on a connection kept open, while the context lasts.

    As behind a balancer, no request is begun once /readyz says no.
    """
    seen, stop = Load(), threading.Event()
    welcome = threading.Event()
    welcome.set()

    def send(first: int) -> None:
        client, n = RankClient(server.url, timeout_s=30), first
        while not stop.is_set() and welcome.is_set():
            start_s = time.perf_counter()
            try:
                status, body = client.post(bodies[n % len(bodies)])
            except (OSError, http.client.HTTPException) as error:
                seen.lost.append(error)
            else:
                seen.seconds.append(time.perf_counter() - start_s)
                seen.answers.append((status, json.loads(body)))
            n += 1
        client.close()

    def probe() -> None:
        while not stop.wait(0.1):
            try:
                if server.get("/readyz")[0] != 200:
                    welcome.clear()
            except OSError:
                welcome.clear()

    threads = [threading.Thread(target=send, args=(n,)) for n in range(clients)] + [threading.Thread(target=probe)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        stop.set()
        for thread in threads:
            thread.join()
