"""A stream's own answers over HTTP: /metrics for Prometheus, /healthz and /readyz for whoever restarts it.

/healthz, 200 or 503: the stream commits bundles (an idle one too, of nothing) and its store answers. Restarting is
always safe, so a stream that fails this for long is best restarted. /readyz: every partition has had records put
since the start, or is at its end. Both say why in one JSON object.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, make_server

import msgspec
from prometheus_client import make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer

from models.errors import InputError, VqlError
from pipelines.metrics import StreamMetrics
from pipelines.worker import RowsHandle, opened_rows

STALE_S = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Health:
    """What is asked when someone asks whether a stream is well. stale_s: the oldest that its last bundle may be."""

    metrics: StreamMetrics
    store: RowsHandle
    checkpoint_id: str
    started_s: float
    stale_s: float = STALE_S

    def healthy(self, now_s: float) -> dict[str, Any]:
        """`ok`, and the facts."""
        last_s = self.metrics.last_commit_s
        age_s = now_s - (self.started_s if last_s is None else last_s)
        store = self._store_error()
        facts = {"last_commit_age_s": round(age_s, 1), "stale_s": self.stale_s, "store": store or "answers"}
        return {"ok": age_s <= self.stale_s and store is None} | facts

    def ready(self) -> dict[str, Any]:
        """`ok`, and the partitions that are neither at their end nor had a record put."""
        partitions = dict(self.metrics.partitions)
        waiting = [partition for partition, progress in partitions.items() if not progress.ready]
        return {"ok": bool(partitions) and not waiting, "partitions": len(partitions), "waiting": waiting}

    def _store_error(self) -> str | None:
        try:
            opened_rows(self.store).positions(self.checkpoint_id)
        except VqlError as error:
            return str(error)
        return None


class _QuietRequests(WSGIRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """A probe every few seconds is not news."""


class _Server(ThreadingWSGIServer):
    # A probe that waits for a store must not hold up the end of the process.
    daemon_threads = True
    block_on_close = False


@contextmanager
def served(health: Health, host: str, port: int) -> Iterator[int]:
    """Answer on host:port (0: a free one) while the context lasts; the port. Raises InputError for one in use."""
    try:
        server = make_server(host, port, _application(health), _Server, _QuietRequests)
    except (OSError, OverflowError) as error:
        raise InputError(f"metrics cannot be served at {host}:{port}: {error}; name a free port, or 0") from error
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), name="health", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _application(health: Health) -> Callable[..., Iterable[bytes]]:
    metrics = make_wsgi_app(health.metrics.registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        path = environ["PATH_INFO"]
        if path == "/metrics":
            return metrics(environ, start_response)
        if path not in ("/healthz", "/readyz"):
            start_response("404 Not Found", [("Content-Type", "text/plain")])
            return [b"there are /metrics, /healthz and /readyz\n"]
        said = health.healthy(time.time()) if path == "/healthz" else health.ready()
        status = "200 OK" if said["ok"] else "503 Service Unavailable"
        start_response(status, [("Content-Type", "application/json")])
        return [msgspec.json.encode(said) + b"\n"]

    return answer
