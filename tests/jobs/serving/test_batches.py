"""The batcher: what is scored together, what waits, and that one request's trouble is not another's."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence

import pytest

from feature_repo.reader import FRESH
from jobs.scoring import Asked, Scored, Scores
from jobs.serving.batches import Batcher, BatchRules, BusyError
from models.errors import StoreError


class Recorder:
    """Scores a user as the number of its id, and keeps the batches. It waits for `go` first."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.go = threading.Event()
        self.go.set()

    def __call__(self, asked: Sequence[Asked]) -> Scores:
        self.go.wait()
        self.batches.append([one.user_id for one in asked])
        if "bad" in self.batches[-1]:
            raise ValueError("a user that cannot be scored")
        if "lost" in self.batches[-1]:
            raise StoreError("gone")
        users = [Scored(scores=[float(one.user_id)], history=FRESH, unknown=[]) for one in asked]
        return Scores(checkpoint_id="c", users=users, read_s=0.0, score_s=0.0)


def ask(*user_ids: str) -> list[Asked]:
    return [Asked(user_id=user_id, item_ids=["i"], now_ms=0) for user_id in user_ids]


def run(
    recorder: Recorder, rules: BatchRules, requests: Sequence[Sequence[str]], then: Callable[[], None] | None = None
):
    """Each request's result or exception, all asked at once; `then` is called when they wait."""

    async def main():
        batcher = Batcher(recorder, rules)
        tasks = [asyncio.create_task(batcher.rank(ask(*users))) for users in requests]
        await asyncio.sleep(0.05)
        if then:
            then()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await batcher.close()
        assert (batcher.waiting_users, batcher.longest_work_s) == (0, 0.0)
        return results

    return asyncio.run(main())


def test_requests_gather_while_a_batch_is_scored_and_each_gets_its_own_users():
    recorder = Recorder()
    recorder.go.clear()
    results = run(recorder, BatchRules(users_max=4), [["0"], ["1", "2"], ["3"], ["4", "5"]], recorder.go.set)
    assert recorder.batches == [["0"], ["1", "2", "3"], ["4", "5"]]
    assert [[user.scores for user in each.users] for each in results] == [
        [[0.0]],
        [[1.0], [2.0]],
        [[3.0]],
        [[4.0], [5.0]],
    ]
    assert [each.batch_users for each in results] == [1, 3, 3, 2]


def test_a_wait_gathers_requests_before_the_first_batch_and_a_full_batch_does_not_wait():
    recorder = Recorder()
    run(recorder, BatchRules(users_max=8, wait_s=0.02), [["0"], ["1"], ["2"]])
    assert recorder.batches == [["0", "1", "2"]]
    recorder = Recorder()
    run(recorder, BatchRules(users_max=2, wait_s=60.0), [["0"], ["1"], ["2", "3"]])
    assert recorder.batches == [["0", "1"], ["2", "3"]]


def test_a_request_with_more_users_than_a_batch_is_one_by_itself():
    recorder = Recorder()
    results = run(recorder, BatchRules(users_max=2, wait_s=0.01), [["0", "1", "2"], ["3"]])
    assert recorder.batches == [["0", "1", "2"], ["3"]]
    assert [user.scores for user in results[0].users] == [[0.0], [1.0], [2.0]]


def test_a_request_that_cannot_be_scored_fails_alone():
    results = run(Recorder(), BatchRules(wait_s=0.01), [["0"], ["bad"], ["2"]])
    assert isinstance(results[1], ValueError)
    assert [results[n].users[0].scores for n in (0, 2)] == [[0.0], [2.0]]


def test_a_lost_store_is_told_to_all_without_asking_again():
    recorder = Recorder()
    results = run(recorder, BatchRules(wait_s=0.01), [["0"], ["lost"]])
    assert [type(each) for each in results] == [StoreError, StoreError]
    assert recorder.batches == [["0", "lost"]]


def test_more_users_than_may_wait_are_refused_at_once():
    recorder = Recorder()
    recorder.go.clear()
    results = run(recorder, BatchRules(users_max=1, waiting_max=2), [["0"], ["1"], ["2"], ["3"]], recorder.go.set)
    assert [isinstance(each, BusyError) for each in results] == [False, False, False, True]


def test_a_caller_who_gave_up_disturbs_nobody():
    recorder = Recorder()
    recorder.go.clear()

    async def main():
        batcher = Batcher(recorder, BatchRules(users_max=1))
        tasks = [asyncio.create_task(batcher.rank(ask(user))) for user in ("0", "1")]
        await asyncio.sleep(0.02)
        tasks[0].cancel()
        recorder.go.set()
        with pytest.raises(asyncio.CancelledError):
            await tasks[0]
        assert (await tasks[1]).users[0].scores == [1.0]
        await batcher.close()

    asyncio.run(main())
