"""No position is committed before the letters up to it are kept, and every one is in the end."""

from __future__ import annotations

import pytest

from models.errors import StoreError
from pipelines.dead_letters import DeadLetter
from pipelines.held_letters import HeldLetters


class Clock:
    """Seconds that the test turns."""

    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class Ledger:
    """The highest committed offset of each partition."""

    def __init__(self) -> None:
        self.at: dict[int, int] = {}

    def commit(self, partition: int, offset: int) -> None:
        self.at[partition] = max(offset, self.at.get(partition, -1))


def letter(partition: int, offset: int) -> DeadLetter:
    return DeadLetter(epoch=1, partition=partition, offset=offset, reason="json", detail="", value=b"{")


def test_without_letters_a_position_is_committed_at_once() -> None:
    ledger = Ledger()
    HeldLetters().commit(3, 17, ledger.commit)
    assert ledger.at == {3: 17}


def test_a_position_waits_for_the_letters_before_it_and_for_no_others() -> None:
    held, ledger, kept = HeldLetters(), Ledger(), []
    held.hold([letter(0, 9), letter(0, 5), letter(1, 70)])
    for partition, offset in ((0, 4), (0, 12), (1, 69), (2, 8)):
        held.commit(partition, offset, ledger.commit)
    assert ledger.at == {0: 4, 1: 69, 2: 8}

    held.keep(kept.extend)

    assert [each.offset for each in kept] == [9, 5, 70]
    assert ledger.at == {0: 12, 1: 69, 2: 8}
    held.commit(1, 99, ledger.commit)
    assert ledger.at[1] == 99


def test_the_first_record_of_a_partition_holds_back_everything() -> None:
    held, ledger = HeldLetters(), Ledger()
    held.hold([letter(0, 0)])
    held.commit(0, 3, ledger.commit)
    assert ledger.at == {0: -1}
    held.keep(lambda _: None)
    assert ledger.at == {0: 3}


def test_letters_that_come_while_others_are_written_hold_on() -> None:
    held, ledger = HeldLetters(), Ledger()
    held.hold([letter(0, 5)])
    held.commit(0, 6, ledger.commit)

    def write(_: list[DeadLetter]) -> None:
        held.hold([letter(0, 8)])
        held.commit(0, 20, ledger.commit)

    held.keep(write)

    assert ledger.at == {0: 7}
    held.keep(lambda _: None)
    assert ledger.at == {0: 20}


def test_what_cannot_be_written_is_held_on() -> None:
    held, ledger, kept = HeldLetters(), Ledger(), []
    held.hold([letter(0, 5)])
    held.commit(0, 6, ledger.commit)

    def fail(_: list[DeadLetter]) -> None:
        raise StoreError("the disk is full")

    with pytest.raises(StoreError):
        held.keep(fail)
    assert ledger.at == {0: 4}
    held.keep(kept.extend)
    assert (len(kept), ledger.at) == (1, {0: 6})


def test_letters_are_due_when_the_oldest_has_waited() -> None:
    clock = Clock()
    held = HeldLetters(clock)
    assert not held.due(0.0)
    held.hold([letter(0, 1)])
    assert (held.due(0.0), held.due(2.0)) == (True, False)
    clock.now_s += 1.5
    held.hold([letter(0, 2)])
    clock.now_s += 0.5
    assert held.due(2.0)
    held.keep(lambda _: None)
    assert not held.due(0.0)
