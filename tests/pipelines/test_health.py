"""The health endpoint says what is: over real HTTP, over a real store."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from feature_repo.handle import StoreHandle
from models.errors import InputError
from pipelines.health import Health, served
from pipelines.metrics import StreamMetrics
from pipelines.worker import forget_opened
from tests.servers import get

CHECKPOINT_ID = "ab" * 16


@pytest.fixture
def health(tmp_path: Path) -> Health:
    forget_opened()
    metrics = StreamMetrics()
    metrics.begin({0: -1})
    return Health(
        metrics=metrics, store=StoreHandle(state=tmp_path), checkpoint_id=CHECKPOINT_ID, started_s=time.time()
    )


@pytest.fixture
def address(health: Health) -> Iterator[str]:
    with served(health, "127.0.0.1", 0) as port:
        yield f"http://127.0.0.1:{port}"


def test_the_metrics_are_served_as_prometheus_reads_them(health: Health, address: str) -> None:
    health.metrics.dead_letters(["json"])
    code, text = get(f"{address}/metrics")
    assert code == 200
    assert 'vql_stream_dead_letters_total{reason="json"} 1.0' in text.splitlines()


def test_a_fresh_stream_is_healthy_and_ready_once_something_is_put(health: Health, address: str) -> None:
    code, said = get(f"{address}/healthz")
    assert (code, json.loads(said)["store"]) == (200, "answers")
    health.metrics.log_end(0, 5)
    code, said = get(f"{address}/readyz")
    assert (code, json.loads(said)["waiting"]) == (503, [0])
    health.metrics.taken(0, np.array([1]), np.array([-1]))
    health.metrics.put(0)
    assert get(f"{address}/readyz")[0] == 200


def test_a_stream_that_commits_nothing_any_more_is_not_healthy(health: Health) -> None:
    health.metrics.committed(0, 3)
    now_s = time.time()
    assert health.healthy(now_s)["ok"]
    stale = health.healthy(now_s + health.stale_s + 1)
    assert not stale["ok"]
    assert stale["last_commit_age_s"] == pytest.approx(health.stale_s + 1, abs=1.0)


def test_a_store_that_cannot_be_used_is_named(health: Health, address: str, tmp_path: Path) -> None:
    (tmp_path / "online.db").write_bytes(b"no database at all, and long enough to be looked at" * 100)
    code, said = get(f"{address}/healthz")
    assert code == 503
    assert "online.db" in json.loads(said)["store"]


def test_nothing_else_is_there(address: str) -> None:
    code, said = get(f"{address}/")
    assert (code, "/healthz" in said) == (404, True)


def test_a_port_in_use_is_named(health: Health) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"127.0.0.1:{port}.*name a free port"), served(health, "127.0.0.1", port):
            pass


def test_the_port_is_free_again_afterwards(health: Health) -> None:
    with served(health, "127.0.0.1", 0) as port:
        pass
    with served(health, "127.0.0.1", port) as again:
        assert again == port
