"""A topic with its checkpoint and its reference: what a scenario streams, and how its end is judged."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from feature_repo.store import Backfill
from models.checkpoint import Checkpoint
from pipelines.dead_letters import read_dead_letters
from tests.faults.gitlog import GitLog
from tests.faults.reference import Differences, Reference, differences
from tests.faults.runner import Ended, Job
from tests.redis_server import RedisServer

WAIT_S = 120.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Scene:
    """The records of `log` on a topic, and the rows that they must give."""

    address: str
    topic: str
    log: GitLog
    checkpoint: Checkpoint
    reference: Reference

    def begin(self, store: RedisServer) -> RedisRows:
        """A new store, backfilled with nothing, so that every start can resume; the test's own handle of it."""
        rows = RedisRows(RedisSettings(url=store.url))
        rows.record_backfill(
            self.checkpoint.checkpoint_id, Backfill(epoch=1, cut={}, users=0, events=0, log=self.topic)
        )
        return rows

    def job(self, url: str, folder: Path) -> Job:
        """A stream over all of it, in the product's default batches and bundles."""
        return Job(
            bootstrap_servers=self.address,
            topic=self.topic,
            checkpoint=str(self.checkpoint.path),
            redis_url=url,
            folder=str(folder),
        )

    def compare(self, rows: RedisRows) -> Differences:
        found = differences(rows, self.checkpoint, self.reference)
        print(found)
        return found

    def require_exact(self, rows: RedisRows, folder: Path) -> None:
        """Every user's row is the reference's, and every other record is a dead letter, once."""
        found = self.compare(rows)
        assert not found.who, f"{found}: {sorted(found.who)[:20]}"
        assert found.strangers == 0
        letters = read_dead_letters(folder / "dead_letters")
        assert sorted(letter.position for letter in letters) == self.log.bad_positions
        assert {letter.reason for letter in letters} == {"future"}
        assert found.events + len(letters) == len(self.log)

    def committed(self, rows: RedisRows) -> dict[int, int]:
        """The offset that is committed of each partition."""
        return {
            partition: at for partition, (_, at) in rows.positions(self.checkpoint.checkpoint_id).items() if at >= 0
        }


def require_done(ended: Ended) -> Ended:
    assert ended.code == 0, f"exit code {ended.code}:\n{ended.output[-5000:]}"
    print({name: ended.report[name] for name in ("seconds", "events_folded", "events_skipped", "conflicts")})
    return ended


def wait_until(reached: Callable[[], bool], interval_s: float = 0.001) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(interval_s)
