"""Which step leads where, that each is done once, and what a second operator is told."""

from __future__ import annotations

import random

import pytest

from jobs.releases.states import NO_LIVE, State, added, gated, promoted, retired, rolled_back, stepped
from models.errors import InputError, VqlError
from tests.jobs.releases.way import History


@pytest.fixture
def history() -> History:
    return History()


def test_the_way_of_the_first_release_needs_no_shadow(history: History) -> None:
    assert history.do(added(history.now, "a", "/a")) == [State.TRAINED]
    assert history.do(gated(history.now, "a", NO_LIVE)) == [State.GATED]
    assert history.do(stepped(history.now, "a", State.BACKFILLED)) == [State.BACKFILLED]
    assert history.do(promoted(history.now, "a")) == [State.LIVE]
    assert history.now.live is not None
    assert history.now.live_id == "a"


def test_the_next_one_has_to_be_shadow_first_and_takes_over_in_one_go(history: History) -> None:
    history.live("a")
    history.do(added(history.now, "b", "/b"))
    history.do(gated(history.now, "b", "a"))
    history.do(stepped(history.now, "b", State.BACKFILLED))
    with pytest.raises(InputError, match="b is backfilled, and cannot become live; run vql release shadow b first"):
        promoted(history.now, "b")
    history.do(stepped(history.now, "b", State.SHADOW))
    assert history.do(promoted(history.now, "b")) == [State.STANDBY, State.LIVE]
    assert history.states() == {"a": "standby", "b": "live"}


def test_a_script_of_all_steps_that_is_run_again_does_nothing(history: History) -> None:
    history.live("a")
    history.live("b")
    before = history.now
    history.live("b")
    assert history.do(added(history.now, "b", "/b")) == []
    assert history.now == before


def test_no_step_can_be_left_out(history: History) -> None:
    history.do(added(history.now, "a", "/a"))
    with pytest.raises(InputError, match="a is trained, and cannot become backfilled; run vql release gate a first"):
        stepped(history.now, "a", State.BACKFILLED)
    with pytest.raises(InputError, match="a is trained, and cannot become shadow"):
        stepped(history.now, "a", State.SHADOW)
    with pytest.raises(InputError, match="a is trained, and cannot become live"):
        promoted(history.now, "a")


def test_who_was_judged_against_another_than_what_is_live_is_judged_again(history: History) -> None:
    history.live("a")
    history.ready("b")
    history.ready("c")
    history.do(promoted(history.now, "c"))
    with pytest.raises(InputError, match="b was not judged against what is live now, c; run vql release gate b again"):
        promoted(history.now, "b")
    # A judgement that was begun before the promotion comes too late.
    with pytest.raises(InputError, match="b was judged against a, and c is live now"):
        gated(history.now, "b", "a")
    assert history.do(gated(history.now, "b", "c")) == [State.SHADOW]
    assert history.do(gated(history.now, "b", "c")) == []
    assert history.do(promoted(history.now, "b")) == [State.STANDBY, State.LIVE]


def test_judged_against_nothing_is_not_enough_once_something_is_live(history: History) -> None:
    history.ready("a")
    history.ready("b")
    history.do(promoted(history.now, "a"))
    with pytest.raises(InputError, match="not judged against what is live now, a"):
        promoted(history.now, "b")


def test_a_rollback_goes_to_what_was_live_before_and_only_once(history: History) -> None:
    for name in "abc":
        history.live(name)
    assert history.do(rolled_back(history.now, "c")) == [State.STANDBY, State.LIVE]
    assert history.now.live_id == "b"
    assert history.do(rolled_back(history.now, "c")) == []
    # Not to c, which was left because it was bad.
    history.do(rolled_back(history.now, "b"))
    assert history.now.live_id == "a"
    with pytest.raises(InputError, match="nothing that was live before a stands by; vql release promote another"):
        rolled_back(history.now, "a")


def test_a_release_that_was_left_can_be_promoted_again_and_left_again(history: History) -> None:
    history.live("a")
    history.live("b")
    for _ in range(2):
        history.do(rolled_back(history.now, "b"))
        assert history.states() == {"a": "live", "b": "standby"}
        assert history.do(promoted(history.now, "b")) == [State.STANDBY, State.LIVE]
        assert history.states() == {"a": "standby", "b": "live"}


def test_a_rollback_skips_what_is_retired(history: History) -> None:
    for name in "abc":
        history.live(name)
    history.do(retired(history.now, "b"))
    history.do(rolled_back(history.now, "c"))
    assert history.states() == {"a": "live", "b": "retired", "c": "standby"}


def test_what_is_live_is_not_retired_and_what_is_retired_does_not_come_back(history: History) -> None:
    history.live("a")
    with pytest.raises(InputError, match="a is live: rankers read it"):
        retired(history.now, "a")
    history.live("b")
    assert history.do(retired(history.now, "a")) == [State.RETIRED]
    assert history.do(retired(history.now, "a")) == []
    for step in (
        lambda: added(history.now, "a", "/a"),
        lambda: gated(history.now, "a", "b"),
        lambda: stepped(history.now, "a", State.SHADOW),
        lambda: promoted(history.now, "a"),
        lambda: rolled_back(history.now, "a"),
    ):
        with pytest.raises(InputError, match="a is retired"):
            step()


def test_a_release_is_named_by_its_id_its_beginning_or_its_folder(history: History) -> None:
    for name in ("abc", "abd"):
        history.do(added(history.now, name, f"/checkpoints/{name}"))
    assert {history.now.named(n).checkpoint_id for n in ("abc", "/checkpoints/abc")} == {"abc"}
    assert history.now.named("abd").checkpoint_id == "abd"
    for name, found in (("ab", 2), ("", 0), ("abx", 0)):
        with pytest.raises(InputError, match=f"names {found} checkpoints; known are: abc, abd"):
            history.now.named(name)
    with pytest.raises(InputError, match="abc is at /checkpoints/abc already"):
        added(history.now, "abc", "/elsewhere")


def test_when_it_was_live_last(history: History) -> None:
    history.live("a")
    assert history.now.left_ms("a") is None
    history.live("b")
    assert history.now.left_ms("a") == history.now.current["a"].at_ms


def test_whatever_the_order_of_steps_one_at_most_is_live_and_it_was_judged(history: History) -> None:
    """Steps at random: those out of turn are refused, and what is left is always sound."""
    rng = random.Random(7)
    names = ["a", "b", "c", "d"]
    done = 0
    for _ in range(3000):
        name = rng.choice(names)
        step = rng.choice(
            [
                lambda n: added(history.now, n, f"/{n}"),
                lambda n: gated(history.now, n, rng.choice([history.now.live_id, *names])),
                lambda n: stepped(history.now, n, State.BACKFILLED),
                lambda n: stepped(history.now, n, State.SHADOW),
                lambda n: promoted(history.now, n),
                lambda n: rolled_back(history.now, n),
                lambda n: retired(history.now, n) if rng.random() < 0.02 else [],
            ]
        )
        before = history.now
        try:
            changes = step(name)
        except VqlError:
            continue
        history.do(changes)
        done += bool(changes)
        live = [n for n, state in history.states().items() if state == "live"]
        assert len(live) <= 1
        # What is live once is never without a successor.
        assert before.live is None or live
        if live and live[0] != before.live_id:
            entered = history.now.current[live[0]]
            was = before.current[live[0]]
            assert was.state == State.STANDBY or before.judged(entered.checkpoint_id)
    assert done > 50
