"""The on-call's commands: what they show, what they do, and with which code they end."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from uuid import uuid4

import msgspec
import pytest

from pipelines.dead_letters import DeadLetter, write_dead_letters
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog, open_topic
from pipelines.replay import Rules, replay_turn
from tests.jobs.commands import assert_one_line
from tests.kafka_broker import Broker
from tests.pipelines.letters_on_topics import messages_of
from tests.small import START_MS, random_events

(EVENT,) = random_events(1)
GOOD = msgspec.json.encode(EVENT)


def letter(partition: int, offset: int, reason: str, value: bytes | None, epoch: int = 1) -> DeadLetter:
    return DeadLetter(
        epoch=epoch,
        partition=partition,
        offset=offset,
        reason=reason,
        detail=f"because of {reason} \x1b[2J",
        value=value,
        key=EVENT.user_id.encode(),
        log_time_ms=START_MS + offset,
    )


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """A log's folder with five letters; those of reason future are events by now."""
    write_dead_letters(
        tmp_path / "log" / "dead_letters",
        [
            letter(0, 10, "json", b"\x00{[b]\xff"),
            letter(0, 11, "json", b"{"),
            letter(1, 10, "future", GOOD),
            letter(1, 12, "future", GOOD),
            letter(1, 12, "json", b"{{", epoch=2),
        ],
    )
    return tmp_path / "log"


@pytest.fixture
def topic(broker: Broker, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("VQL_KAFKA_BOOTSTRAP_SERVERS", broker.address)
    return broker.create_topic(f"events-{uuid4().hex}")


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("list", ["--reason", "--partition", "--since", "--json", "Example"]),
        ("show", ["--save", "--whole", "PARTITION:OFFSET", "Example"]),
        ("replay", ["--yes", "--again", "--force", "--all", "Exit codes", "not both", "Example"]),
    ],
)
def test_help_teaches_each_command(vql, command: str, words: list[str]) -> None:
    said = vql("dead-letters", command, "--help")
    assert said.code == 0
    assert [word for word in words if word not in said.out] == []


def test_list_counts_and_shows_the_newest_first(vql, log: Path) -> None:
    said = vql("dead-letters", "list", "--log", log)

    assert (said.code, said.err) == (0, "")
    assert "the newest 5 of 5" in said.out
    places = ["2:1:12", "1:1:12", "1:0:11", "1:1:10", "1:0:10"]
    assert sorted(places, key=said.out.index) == places
    assert "\x1b[2J" not in said.out


def test_list_takes_what_its_options_say(vql, log: Path) -> None:
    options = ["--reason", "json", "--reason", "future", "--partition", 1, "--since", 11]
    said = vql("dead-letters", "list", "--log", log, *options, "--limit", 1)

    assert "the newest 1 of 2" in said.out
    assert "2:1:12" in said.out
    assert "no dead letters that match" in vql("dead-letters", "list", "--log", log, "--reason", "size").out


def test_list_prints_lines_of_json_for_programs(vql, log: Path) -> None:
    said = vql("dead-letters", "list", "--log", log, "--json")

    rows = [json.loads(line) for line in said.out.splitlines()]
    assert [(row["epoch"], row["partition"], row["offset"]) for row in rows][:2] == [(2, 1, 12), (1, 1, 12)]
    assert {row["reason"] for row in rows} == {"json", "future"}
    assert rows[-1]["detail"] == "because of json \x1b[2J"
    assert {row["replayed"] for row in rows} == {False}


def test_a_log_without_letters_has_none_and_a_folder_that_is_not_there_is_named(vql, tmp_path: Path) -> None:
    said = vql("dead-letters", "list", "--log", tmp_path)
    assert (said.code, said.out) == (0, "no dead letters\n")
    assert_one_line(vql("dead-letters", "list", "--log", tmp_path / "x"), 2, "InputError", f"no log at {tmp_path}/x")


def test_show_says_everything_and_escapes_the_bytes(vql, log: Path, tmp_path: Path) -> None:
    said = vql("dead-letters", "show", "0:10", "--log", log, "--save", tmp_path / "original")

    assert (said.code, said.err) == (0, "")
    for words in ("1:0:10", "2020-09-13", "because of json \\x1b[2J", "6 bytes", "still refused, json:"):
        assert words in said.out
    assert said.out.splitlines()[-1] == "\\x00{[b]\\xff"
    assert (tmp_path / "original").read_bytes() == b"\x00{[b]\xff"
    again = vql("dead-letters", "show", "0:10", "--log", log, "--save", tmp_path / "original")
    assert_one_line(again, 2, "InputError", "name a new file")


def test_show_takes_the_newest_epoch_or_the_one_that_is_named(vql, log: Path) -> None:
    newest = vql("dead-letters", "show", "1:12", "--log", log, "--json")
    named = vql("dead-letters", "show", "1:1:12", "--log", log, "--json")

    assert base64.b64decode(json.loads(newest.out)["value_base64"]) == b"{{"
    assert base64.b64decode(json.loads(named.out)["value_base64"]) == GOOD
    assert json.loads(named.out)["refused_now"] is None


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["show", "0:99"], "no dead letter is at 0:99"),
        (["show", "0"], "'0' is no position"),
        (["list", "--reason", "jsn"], "--reason: 'jsn' is none of json, schema"),
        (["replay", "--topic", "t"], "which letters?"),
        (["replay", "--topic", "t", "0:10", "0:99"], "no dead letter is at 0:99"),
    ],
)
def test_what_does_not_exist_is_named(vql, log: Path, command: list[str], words: str) -> None:
    assert_one_line(vql("dead-letters", *command, "--log", log), 2, "InputError", words)


@pytest.mark.beam
def test_replay_says_what_it_would_do_and_does_it_when_told(vql, log: Path, broker: Broker, topic: str) -> None:
    command = ["dead-letters", "replay", "--log", log, "--topic", topic, "--reason", "future"]

    dry = vql(*command)
    assert (dry.code, dry.out) == (0, f"2 letters would be replayed to {topic}, 0 left out; --yes replays them\n")
    assert messages_of(broker, topic) == []

    done = vql(*command, "--yes")
    assert (done.code, done.out) == (0, f"2 letters replayed to {topic}, 0 left out\n")
    assert [(m.partition(), m.value()) for m in messages_of(broker, topic)] == [(1, GOOD), (1, GOOD)]
    assert "at offset 1" in vql("dead-letters", "list", "--log", log).out
    assert f"to {topic}, at offset 0" in vql("dead-letters", "show", "1:10", "--log", log).out

    second = vql(*command, "--yes")
    assert second.code == 7
    assert "1:1:10: replayed already (at offset 0); --again replays it once more" in second.out
    assert "0 letters replayed" in second.out
    assert vql(*command, "--yes", "--again").code == 0
    assert len(messages_of(broker, topic)) == 4


@pytest.mark.beam
def test_replay_leaves_out_what_is_still_no_event(vql, log: Path, broker: Broker, topic: str) -> None:
    said = vql("dead-letters", "replay", "--log", log, "--topic", topic, "--all", "--yes")

    assert said.code == 7
    assert f"2 letters replayed to {topic}, 3 left out" in said.out
    assert "1:0:11: still refused, json: " in said.out
    assert "2:1:12: of epoch 2" in said.out
    forced = vql("dead-letters", "replay", "0:11", "--log", log, "--topic", topic, "--yes", "--force")
    assert forced.code == 0
    assert messages_of(broker, topic)[0].value() == b"{"


@pytest.mark.beam
def test_replay_without_a_topic_or_a_cluster_is_said(
    vql, log: Path, topic: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["dead-letters", "replay", "--log", log, "--all", "--topic"]
    assert_one_line(vql(*command, "no-such-topic"), 2, "InputError", "no such topic")
    monkeypatch.setenv("VQL_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    monkeypatch.setenv("VQL_KAFKA_TIMEOUT_S", "0.5")
    assert_one_line(vql(*command, topic), 2, "InputError", "127.0.0.1:1 cannot be used")


@pytest.mark.beam
def test_many_left_out_are_summed_up(vql, tmp_path: Path, broker: Broker, topic: str) -> None:
    letters = [letter(0, offset, "json", b"{") for offset in range(30)]
    write_dead_letters(tmp_path / "dead_letters", [*letters, letter(0, 99, "future", GOOD)])
    target = open_topic(KafkaLog(kafka=kafka_settings(), topic=topic))
    replay_turn(tmp_path / "dead_letters", [(1, 0, 99)], target, Rules(now_ms=2 * START_MS))

    said = vql("dead-letters", "replay", "--log", tmp_path, "--topic", topic, "--all")

    assert said.code == 7
    assert said.out.count("still refused, json: ") == 20
    assert "... and 10 more still refused, json" in said.out
    assert "... and 1 more replayed already (at offset 0)" in said.out
    assert "0 letters would be replayed" in said.out
