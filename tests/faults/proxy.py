"""A proxy of TCP between a program and its server: it makes answers late, loses them, or keeps them back."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

CHUNK_BYTES = 1 << 20
RECONNECT_S = 0.05


@dataclass
class Proxy:
    """Passes bytes on, and waits for a server that is not there.

    late_s: bounds of the wait before each answer. lost_share: how many answers end with their connection. hold_at:
    from a request on that has these bytes, answers are kept back, which `held` tells, until `release`; hold_after of
    such requests pass before. pass_bytes: of answers, before the rest is kept back in the same way.
    """

    port: int
    server_port: int
    seed: int = 0
    late_s: tuple[float, float] = (0.0, 0.0)
    lost_share: float = 0.0
    hold_at: bytes | None = None
    hold_after: int = 0
    pass_bytes: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    answers: int = 0
    lost: int = 0

    def __post_init__(self) -> None:
        self._open, self._ended = threading.Event(), threading.Event()
        self._open.set()
        self._rng = random.Random(self.seed)
        self._sockets: list[socket.socket] = []

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def serve(self, listener: socket.socket) -> None:
        with suppress(OSError):
            while True:
                client, _ = listener.accept()
                threading.Thread(target=self._connect, args=(client,), daemon=True).start()

    def _connect(self, client: socket.socket) -> None:
        while True:
            try:
                server = socket.create_connection(("127.0.0.1", self.server_port))
                break
            except OSError:
                if self._ended.wait(RECONNECT_S):
                    client.close()
                    return
        self._sockets += [client, server]
        asked = threading.Event()
        threading.Thread(target=self._requests, args=(client, server, asked), daemon=True).start()
        self._answers(client, server, asked)

    def _requests(self, client: socket.socket, server: socket.socket, asked: threading.Event) -> None:
        with suppress(OSError):
            while chunk := client.recv(CHUNK_BYTES):
                asked.set()
                if self.hold_at is not None and self.hold_at in chunk:
                    if self.hold_after == 0:
                        self._open.clear()
                    self.hold_after = max(0, self.hold_after - 1)
                server.sendall(chunk)
        _end(client, server)

    def _answers(self, client: socket.socket, server: socket.socket, asked: threading.Event) -> None:
        with suppress(OSError):
            while chunk := server.recv(CHUNK_BYTES):
                # An answer of many chunks is late once.
                if asked.is_set():
                    asked.clear()
                    self.answers += 1
                    time.sleep(self._rng.uniform(*self.late_s))
                    if self._rng.random() < self.lost_share:
                        self.lost += 1
                        break
                if self.pass_bytes is not None:
                    client.sendall(chunk[: self.pass_bytes])
                    chunk, self.pass_bytes = chunk[self.pass_bytes :], max(0, self.pass_bytes - len(chunk))
                    if self.pass_bytes == 0:
                        self._open.clear()
                if not self._open.is_set():
                    self.held.set()
                    self._open.wait()
                client.sendall(chunk)
        _end(client, server)

    def release(self) -> None:
        self.hold_at = self.pass_bytes = None
        self._open.set()

    def close(self) -> None:
        self._ended.set()
        self.release()
        _end(*self._sockets)


def _end(*sockets: socket.socket) -> None:
    """Shut both ways, which wakes the threads that read them."""
    for each in sockets:
        with suppress(OSError):
            each.shutdown(socket.SHUT_RDWR)
        each.close()


@contextmanager
def running_proxy(server_port: int, seed: int = 0) -> Iterator[Proxy]:
    """A proxy before the server at this port of 127.0.0.1, for as long as the context lasts."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        proxy = Proxy(port=listener.getsockname()[1], server_port=server_port, seed=seed)
        threading.Thread(target=proxy.serve, args=(listener,), daemon=True).start()
        try:
            yield proxy
        finally:
            # close alone would leave the thread in its accept.
            listener.shutdown(socket.SHUT_RDWR)
            proxy.close()
