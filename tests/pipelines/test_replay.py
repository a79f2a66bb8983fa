"""Letters go back to their topic once, whole, in order, and to the partition they came from."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from models.errors import StoreError
from pipelines import dead_letter_topic, replay
from pipelines.dead_letters import DeadLetter, write_dead_letters
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog, Topic, open_topic
from pipelines.replay import REPLAY_OF, Decision, Rules, plan_turn, read_replays, refusal, replay_turn, turns
from tests.kafka_broker import Broker
from tests.pipelines.letters_on_topics import messages_of
from tests.small import random_events

pytestmark = pytest.mark.beam

NOW_MS = 1_700_000_000_000
RULES = Rules(now_ms=NOW_MS)
(EVENT,) = random_events(1)


def letter(offset: int, partition: int = 1, epoch: int = 1) -> DeadLetter:
    """One that is an event by now."""
    event = msgspec.structs.replace(EVENT, event_id=f"e{offset}")
    return DeadLetter(
        epoch=epoch,
        partition=partition,
        offset=offset,
        reason="future",
        detail="ahead",
        value=msgspec.json.encode(event),
        key=event.user_id.encode(),
    )


@pytest.fixture
def letters(tmp_path: Path) -> Path:
    return tmp_path / "dead_letters"


@pytest.fixture
def target(broker: Broker, topic: str) -> Topic:
    return opened(broker, topic)


def opened(broker: Broker, topic: str) -> Topic:
    return open_topic(KafkaLog(kafka=kafka_settings(bootstrap_servers=broker.address), topic=topic))


def places(these: Sequence[DeadLetter]) -> list[tuple[int, int, int]]:
    return [each.position for each in these]


def left_out(decisions: list[Decision]) -> list[str]:
    return [each.left_out for each in decisions if each.left_out is not None]


def test_letters_are_produced_whole_and_in_order_to_their_own_partition(
    broker: Broker, target: Topic, letters: Path
) -> None:
    mine = [letter(5, 1), letter(7, 1), letter(3, 0)]
    write_dead_letters(letters, mine)

    decisions = replay_turn(letters, places(mine), target, RULES)

    assert left_out(decisions) == []
    sent = messages_of(broker, target.identity.name)
    assert [(m.partition(), m.key(), m.value()) for m in sent] == [
        (x.partition, x.key, x.value) for x in (mine[2], mine[0], mine[1])
    ]
    assert [dict(m.headers())[REPLAY_OF] for m in sent] == [b"1:0:3", b"1:1:5", b"1:1:7"]
    noted = read_replays(letters)
    assert {place: x.new_offset for place, x in noted.items()} == {(1, 0, 3): 0, (1, 1, 5): 0, (1, 1, 7): 1}
    assert {x.topic for x in noted.values()} == {target.identity.name}
    assert {x.claimed_ms for x in noted.values()} == {NOW_MS}


def test_a_plan_says_the_same_and_does_nothing(broker: Broker, target: Topic, letters: Path) -> None:
    write_dead_letters(letters, [letter(5), replace(letter(6), value=b"{")])
    mine = [(1, 1, 5), (1, 1, 6)]

    decisions = plan_turn(letters, mine, target, RULES)

    assert messages_of(broker, target.identity.name) == []
    assert read_replays(letters) == {}
    assert replay_turn(letters, mine, target, RULES) == decisions


def test_a_second_replay_is_refused_unless_it_is_asked_for(broker: Broker, target: Topic, letters: Path) -> None:
    write_dead_letters(letters, [letter(5)])
    mine = places([letter(5)])
    replay_turn(letters, mine, target, RULES)

    assert left_out(replay_turn(letters, mine, target, RULES)) == [
        "replayed already (at offset 0); --again replays it once more"
    ]
    assert len(messages_of(broker, target.identity.name)) == 1
    assert left_out(replay_turn(letters, mine, target, replace(RULES, again=True))) == []
    assert [x.new_offset for x in read_replays(letters).values()] == [1]


def test_what_is_still_no_event_is_left_out_unless_forced(broker: Broker, target: Topic, letters: Path) -> None:
    write_dead_letters(letters, [replace(letter(5), value=b"{")])
    mine = places([letter(5)])

    (why,) = left_out(replay_turn(letters, mine, target, RULES))
    assert why.startswith("still refused, json: ")
    assert read_replays(letters) == {}
    assert left_out(replay_turn(letters, mine, target, replace(RULES, force=True))) == []
    assert [m.value() for m in messages_of(broker, target.identity.name)] == [b"{"]


def test_a_letter_whose_partition_is_not_known_is_left_out_even_when_forced(target: Topic, letters: Path) -> None:
    mine = [letter(5, epoch=2), letter(6, partition=9)]
    write_dead_letters(letters, mine)

    words = left_out(replay_turn(letters, places(mine), target, replace(RULES, force=True)))

    assert sorted(word[:26] for word in words) == ["of epoch 2; its partition ", "the topic has no partition"]


def test_of_two_replays_at_once_each_letter_goes_with_one(broker: Broker, target: Topic, letters: Path) -> None:
    mine = [letter(offset) for offset in range(20)]
    write_dead_letters(letters, mine)

    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: replay_turn(letters, places(mine), target, RULES), range(3)))

    assert len(messages_of(broker, target.identity.name)) == 20
    assert sum(len(decisions) - len(left_out(decisions)) for decisions in done) == 20


def test_letters_that_are_not_confirmed_stay_claimed_and_say_so(
    broker: Broker, topic: str, letters: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dead_letter_topic, "DELIVERY_WAIT_S", 1.0)
    monkeypatch.setattr(replay, "DELIVERY_WAIT_S", 1.0)
    target = opened(broker, topic)
    broker.delete_topic(topic)
    write_dead_letters(letters, [letter(5)])

    with pytest.raises(StoreError, match=r"1 of 1 letters were not confirmed .* 1:1:5"):
        replay_turn(letters, places([letter(5)]), target, RULES)

    assert left_out(plan_turn(letters, places([letter(5)]), target, RULES)) == [
        "replayed already (begun, and not confirmed); --again replays it once more"
    ]


def test_a_letter_from_the_future_is_taken_when_its_time_has_come() -> None:
    mine = letter(5)

    assert refusal(mine, EVENT.event_time_ms) is None
    assert refusal(mine, EVENT.event_time_ms - 3_600_000).startswith("future: ")
    assert refusal(replace(mine, key=b"another"), EVENT.event_time_ms).startswith("key: ")


def test_turns_are_in_log_order_and_hold_what_fits_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "BYTES_PER_TURN", 100)
    monkeypatch.setattr(replay, "LETTERS_PER_TURN", 3)
    sizes = [500, 60, 30, 30, 1, 1, 1, 1]
    numbered = [((1, 0, n), size_bytes) for n, size_bytes in enumerate(sizes)]

    found = [[offset for _, _, offset in turn] for turn in turns(numbered[::-1])]

    assert found == [[0], [1, 2], [3, 4, 5], [6, 7]]
    assert list(turns([])) == []
