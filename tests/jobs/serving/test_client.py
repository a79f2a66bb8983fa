"""The example client: answers, refusals, and a connection that the server closed meanwhile."""

from __future__ import annotations

import socket
import subprocess
import sys

import pytest

from jobs.serving.client import RankClient
from models.checkpoint import Checkpoint
from tests.jobs.serving.processes import ROOT, Server
from tests.jobs.serving.shop import NOW_MS

pytestmark = pytest.mark.slow


def test_it_asks_again_on_one_connection_and_tells_a_refusal(server: Server, checkpoint: Checkpoint):
    client = RankClient(server.url, timeout_s=30)
    first = client.rank({"u0": ["i1", "i2"], "u1": ["i3"]}, NOW_MS)
    assert first["checkpoint_id"] == checkpoint.checkpoint_id
    with pytest.raises(RuntimeError, match=r"^422: users: list should have at least 1 item"):
        client.rank({})
    assert client.rank({"u0": ["i1", "i2"], "u1": ["i3"]}, NOW_MS)["users"] == first["users"]
    client._connection.sock.shutdown(socket.SHUT_RDWR)
    assert client.rank({"u0": ["i1", "i2"], "u1": ["i3"]}, NOW_MS)["users"] == first["users"]
    client.close()


def test_a_server_that_is_not_there_is_an_error():
    with pytest.raises(OSError, match="refused"):
        RankClient("http://127.0.0.1:1").rank({"u0": ["i1"]})


def test_it_is_a_command_too(server: Server):
    command = [sys.executable, "-m", "jobs.serving.client", server.url, "u0", "i1,i2,i3"]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert [line.split()[1][0] for line in said.stdout.splitlines()] == ["i", "i", "i"]
    assert "history: fresh" in said.stderr
