"""`vql audit` and `vql serve --read-log` as commands: what rankers of another process read is audited."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import pytest
from msgspec.structs import replace

from feature_repo.handle import StoreHandle
from feature_repo.store import RowPut
from jobs.backfill import backfill
from jobs.row_difference import AGREES, DAMAGED
from models.row import RowBytes
from models.user_hash import KEY_FILE
from models.wire import RECENT_MAGIC, read_header
from tests.jobs.commands import assert_one_line
from tests.jobs.serving.processes import serving
from tests.jobs.tiny import purchases, take
from tests.small import HOUR_MS, START_MS
from tests.small_ranker import COUNTS, scoring_checkpoint

pytestmark = [pytest.mark.spark, pytest.mark.slow]

USERS = 6
NAMES = [f"u{n}" for n in range(USERS)]


def test_what_a_server_reads_is_audited_and_repaired(
    spark, vql, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "key").write_bytes(b"a key of the tests, of 32 bytes.\n")
    monkeypatch.setenv(KEY_FILE, str(tmp_path / "key"))
    monkeypatch.delenv("VQL_REDIS_URL", raising=False)
    checkpoint, log, state = (
        scoring_checkpoint(tmp_path / "checkpoint", counts=COUNTS),
        tmp_path / "log",
        tmp_path / "state",
    )
    state.mkdir()
    store = StoreHandle(state=state, redis=None)
    take(spark, purchases(range(4), users=USERS), log)
    backfill(spark, checkpoint, log, store)
    (good,) = store.open().get_rows(checkpoint.checkpoint_id, ["u2"])
    damaged = RowBytes(folded=good.folded[:-1] + b"?", recent=good.recent)
    put(store, checkpoint.checkpoint_id, "u2", damaged)

    logging = ("--read-log", tmp_path / "reads", "--read-log-share", 1.0, "--linger", 0)
    with serving(checkpoint.path, state, *logging) as server:
        answer = server.rank({name: ["i1", "i2"] for name in NAMES}, START_MS + 400 * HOUR_MS)
        assert [user["history"] for user in answer["users"]].count("damaged") == 1
        assert 'vql_read_log_reads_total{outcome="dropped"} 0.0' in server.get("/metrics")[1]
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0

    common = ("audit", "--checkpoint", checkpoint.path, "--log", log, "--state", state, "--grace", 0)
    files = ("--output", tmp_path / "a.json", "--plot", tmp_path / "a.png", "--metrics-file", tmp_path / "a.prom")
    both = ("--read-log", tmp_path / "reads", "--store-sample", USERS)
    said = vql(*common, *both, *files, "--repair")
    assert said.code == 9, said
    assert "16.67% of the reads disagree; 0.00% may" in said.out
    assert "1 of 1 wrong rows published anew; 0 are newer than the log" in said.out
    report = json.loads((tmp_path / "a.json").read_text())
    for source in ("reads", "store"):
        assert report["sources"][source]["by_verdict"] == {AGREES: USERS - 1, DAMAGED: 1}
    assert (tmp_path / "a.png").stat().st_size > 1000
    assert 'vql_audit_reads{source="reads",verdict="damaged"} 1.0' in (tmp_path / "a.prom").read_text()
    (after,) = store.open().get_rows(checkpoint.checkpoint_id, ["u2"])
    assert after.folded[64:-4] == good.folded[64:-4]

    assert vql(*common, *both, "--mismatch-max", 0.2).code == 0
    again = vql(*common, "--store-sample", USERS)
    assert again.code == 0, again.out
    assert_one_line(vql(*common), 2, "nothing to audit")
    monkeypatch.delenv(KEY_FILE)
    assert_one_line(vql(*common, *both), 2, "VQL_USER_HASH_KEY_FILE is not set")
    served = vql("serve", "--checkpoint", checkpoint.path, "--state", state, "--read-log", tmp_path / "reads")
    assert_one_line(served, 2, "VQL_USER_HASH_KEY_FILE is not set")


def put(store: StoreHandle, checkpoint_id: str, user_id: str, row: RowBytes) -> None:
    """In place of the row at the same position."""
    stamp = read_header(row.recent, RECENT_MAGIC).stamp
    wrong = RowPut(
        user_id=user_id, stamp=replace(stamp, revision=stamp.revision + 1), recent=row.recent, folded=row.folded
    )
    assert store.open().put_rows(checkpoint_id, [wrong]) == [True]
