from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from models.checkpoint import Checkpoint
from tests.feature_repo.rows import put_all, small_rows
from tests.jobs.commands import assert_one_line
from tests.redis_server import PERSISTENT, running_redis
from tests.small import small_checkpoint


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint")


def test_a_sound_store_is_shown_and_nothing_is_wrong(vql, tmp_path: Path, checkpoint: Checkpoint) -> None:
    rows = StoreHandle(state=tmp_path).open()
    put_all(rows, checkpoint, small_rows(checkpoint, checkpoint.fold(), 200))
    rows.commit_positions(checkpoint.checkpoint_id, 1, {0: 41})
    said = vql("doctor", "--state", tmp_path, "--checkpoint", checkpoint.path)
    assert (said.code, said.err) == (0, "")
    for words in ("embedded (SQLite)", checkpoint.checkpoint_id, "0: 1:41", "nothing is wrong"):
        assert words in said.out


def test_each_fault_is_a_line_with_its_remedy_and_the_code_is_5(
    vql, tmp_path: Path, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "redis").mkdir()
    with running_redis(tmp_path / "redis", PERSISTENT) as server:
        monkeypatch.setenv("VQL_REDIS_URL", server.url)
        with server.client() as client:
            client.config_set("maxmemory-policy", "allkeys-lru")
        said = vql("doctor", "--state", tmp_path, "--checkpoint", checkpoint.path)
        assert said.code == 5
        wrong = [line for line in said.out.splitlines() if line.startswith("wrong: ")]
        for words in (
            "evicts (allkeys-lru), which would make users new; set its maxmemory-policy to noeviction",
            "no generation: it was emptied, or never written to; run vql backfill",
            f"checkpoint {checkpoint.checkpoint_id} has no rows in this store; run vql backfill",
        ):
            assert any(words in line for line in wrong), said.out
        assert len(wrong) == 3
        assert "append-only file" in said.out
        server.stop()
        monkeypatch.setenv("VQL_REDIS_RETRIES", "0")
        assert_one_line(vql("doctor", "--state", tmp_path), 5, "UnavailableError", "does not answer")
