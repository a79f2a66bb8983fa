"""The letters of a forgotten user: kept as places alone, and never replayed, whatever is forced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from feature_repo.forgotten import ForgottenRef, read_forgotten, write_requests
from models.forgotten import ERASED, Request
from pipelines.dead_letters import DeadLetter, read_dead_letters
from pipelines.held_letters import held_letters
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import Topic, TopicIdentity
from pipelines.keep_dead_letters import LetterKeeper
from pipelines.replay import Rules, decide
from pipelines.worker import forget_opened
from tests.small import random_events

pytestmark = pytest.mark.beam

(EVENT,) = random_events(1)
LETTER = DeadLetter(
    epoch=1,
    partition=0,
    offset=7,
    reason="future",
    detail=f"of {EVENT.user_id}",
    key=EVENT.user_id.encode(),
    value=msgspec.json.encode(EVENT),
)
LATER = replace(LETTER, offset=8)
OTHER = replace(LETTER, offset=6, key=b"other", value=b"no event")


@pytest.fixture
def ref(tmp_path: Path) -> ForgottenRef:
    forget_opened()
    (tmp_path / "key").write_bytes(b"k" * 32)
    made = ForgottenRef(path=tmp_path / "forgotten", key_file=tmp_path / "key")
    write_requests(made, EVENT.user_id, [Request(1, 0, 7, 1_000)], 1_000)
    return made


def test_of_what_is_at_or_below_the_request_the_place_is_kept(ref: ForgottenRef, tmp_path: Path) -> None:
    held_letters().hold([OTHER, LETTER, LATER])
    kept = LetterKeeper(tmp_path / "letters", forgotten=ref).keep_held()
    assert kept.dead_letters == 3
    blank = replace(LETTER, key=None, value=None, detail=ERASED)
    assert read_dead_letters(tmp_path / "letters") == [OTHER, blank, LATER]


def test_it_is_not_replayed_and_what_came_later_is(ref: ForgottenRef) -> None:
    topic = Topic(
        kafka=kafka_settings(bootstrap_servers="127.0.0.1:1"),
        identity=TopicIdentity(name="t", topic_id="x", partitions=1),
        epoch=1,
        begins={0: 0},
        ends={0: 9},
    )
    rules = Rules(now_ms=1_700_000_000_000, force=True, again=True, forgotten=read_forgotten(ref))
    for letter, left_out in ((LETTER, ERASED), (LETTER.erased(), ERASED), (LATER, None), (OTHER, None)):
        assert decide(letter, topic, None, rules).left_out == left_out
    assert decide(LETTER, topic, None, replace(rules, forgotten=type(rules.forgotten)())).left_out is None
