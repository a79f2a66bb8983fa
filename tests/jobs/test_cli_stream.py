"""`vql stream` as its operator has it: a process that logs, answers, shares a topic, and ends when it is told to."""

from __future__ import annotations

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
from typer.testing import CliRunner

from feature_repo.handle import StoreHandle
from feature_repo.store import bind_topic
from jobs.cli import app
from jobs.cli_stream import share_of
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.event import Event
from models.row import Row, advance, new_row
from models.wire import Stamp
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog, open_topic
from pipelines.positions import Shard
from tests.kafka_broker import Broker
from tests.pipelines.small_log import assert_rows_equal, read_rows, recent_of
from tests.servers import get
from tests.small import random_events, small_checkpoint

REPOSITORY = Path(__file__).parents[2]
USERS = [f"u{n}" for n in range(30)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Streamed:
    """A topic, and where `vql stream` puts its rows."""

    broker: Broker
    topic: str
    checkpoint: Checkpoint
    folder: Path

    @property
    def store(self) -> StoreHandle:
        return StoreHandle(state=self.folder / "state")

    def produce(self, events: Sequence[Event]) -> list[tuple[int, int]]:
        return self.broker.produce(self.topic, [(event.user_id, msgspec.json.encode(event)) for event in events])

    def start(self, *options: str, name: str = "stream") -> Running:
        command = [sys.executable, "-m", "jobs.cli", "stream", "--topic", self.topic]
        places = {"checkpoint": self.checkpoint.path, "log": self.folder / "log", "state": self.folder / "state"}
        for option, path in places.items():
            command += [f"--{option}", str(path)]
        environment = os.environ | {"VQL_KAFKA_BOOTSTRAP_SERVERS": self.broker.address, "PYTHONPATH": str(REPOSITORY)}
        out, err = self.folder / f"{name}.out", self.folder / f"{name}.err"
        with out.open("wb") as to_out, err.open("wb") as to_err:
            process = subprocess.Popen(
                [*command, *options], cwd=self.folder, env=environment, stdout=to_out, stderr=to_err
            )
        return Running(process=process, out=out, err=err)

    def committed(self) -> int:
        """How many records are committed."""
        return sum(offset + 1 for _, offset in self.store.open().positions(self.checkpoint.checkpoint_id).values())

    def assert_complete(self, events: Sequence[Event], places: Sequence[tuple[int, int]]) -> None:
        assert_rows_equal(read_rows(self.store.open(), self.checkpoint, USERS), self.plain_rows(events, places))

    def plain_rows(self, events: Sequence[Event], places: Sequence[tuple[int, int]]) -> dict[str, Row]:
        """Each user's row from scratch, at the places where Kafka put its events."""
        using, rows = self.checkpoint.fold(), {}
        for user_id in {event.user_id for event in events}:
            mine = [(event, place) for event, place in zip(events, places, strict=True) if event.user_id == user_id]
            (partition,) = {place[0] for _, place in mine}
            recent = recent_of(self.checkpoint, [event for event, _ in mine], [offset for _, (_, offset) in mine])
            position = Stamp(epoch=1, partition=partition, offset=-1)
            rows[user_id], _ = advance(new_row(using.spec, 1, partition), recent, position, using)
        return rows


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A `vql stream` process, and the files that it writes to."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def lines(self) -> list[dict]:
        return [json.loads(line) for line in self.err.read_text().splitlines() if line.startswith("{")]

    def ends(self, within_s: float) -> int:
        try:
            return self.process.wait(within_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"still there after {within_s} s:\n{self.err.read_text()}") from None

    def folded_and_skipped(self) -> tuple[int, int]:
        found = re.search(r"([\d,]+) events folded in .*? ([\d,]+) skipped", self.out.read_text(), re.DOTALL)
        assert found is not None, self.err.read_text()
        return int(found[1].replace(",", "")), int(found[2].replace(",", ""))

    def address(self) -> str:
        """Where it serves its metrics, once it says so."""
        self.wait(lambda: any(line["event"] == "metrics served" for line in self.lines()))
        (line,) = [line for line in self.lines() if line["event"] == "metrics served"]
        return f"http://{line['host']}:{line['port']}"

    def wait(self, done: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + 90
        while not done():
            assert self.process.poll() is None, f"it ended by itself:\n{self.err.read_text()}"
            assert time.monotonic() < deadline_s, f"waited in vain:\n{self.err.read_text()}"
            time.sleep(0.05)


@pytest.fixture
def streamed(broker: Broker, topic: str, tmp_path: Path) -> Streamed:
    (tmp_path / "state").mkdir()
    (tmp_path / "log").mkdir()
    return Streamed(broker=broker, topic=topic, checkpoint=small_checkpoint(tmp_path / "checkpoint"), folder=tmp_path)


@pytest.fixture
def start(streamed: Streamed) -> Iterator[Callable[..., Running]]:
    """Starts streams, and ends those that are left."""
    started: list[Running] = []

    def start(*options: str) -> Running:
        started.append(streamed.start(*options, name=f"stream{len(started)}"))
        return started[-1]

    yield start
    for running in started:
        if running.process.poll() is None:
            running.process.kill()
            running.process.wait()


def sample(text: str, name: str) -> float | None:
    found = [line for line in text.splitlines() if line.startswith(name + " ")]
    return float(found[0].rpartition(" ")[2]) if found else None


@pytest.mark.beam
@pytest.mark.slow
def test_sigterm_under_load_finishes_the_bundle_and_the_next_start_leaves_no_gap(
    streamed: Streamed, start: Callable[..., Running]
) -> None:
    events, places, told = random_events(4000, users=30), [], threading.Event()

    def produce() -> None:
        for first in range(0, 4000, 200):
            places.extend(streamed.produce(events[first : first + 200]))
            time.sleep(0.3)
        told.set()

    running = start("--from", "earliest")
    running.wait(lambda: any(line["event"] == "stream starts" for line in running.lines()))
    producer = threading.Thread(target=produce)
    producer.start()
    running.wait(lambda: streamed.committed() > 0)
    running.process.send_signal(signal.SIGTERM)
    assert running.ends(20) == 0
    producer.join()
    assert told.is_set()
    committed, (folded, skipped) = streamed.committed(), running.folded_and_skipped()
    assert (folded, skipped) == (committed, 0)
    assert committed < 4000
    assert [line["signal"] for line in running.lines() if line["event"] == "stream drains"] == ["SIGTERM"]

    again = start("--until", "end")

    assert again.ends(60) == 0
    assert again.folded_and_skipped() == (4000 - committed, 0)
    streamed.assert_complete(events, places)


@pytest.mark.beam
@pytest.mark.slow
def test_sigterm_while_the_store_hangs_gives_up_in_time_and_commits_nothing(
    streamed: Streamed, start: Callable[..., Running]
) -> None:
    events = random_events(300, users=30)
    places = streamed.produce(events)
    read = open_topic(KafkaLog(kafka=kafka_settings(bootstrap_servers=streamed.broker.address), topic=streamed.topic))
    of = streamed.checkpoint.checkpoint_id
    bind_topic(streamed.store.open(), of, 1, read.identity.topic_id, read.identity.partitions)
    lock = sqlite3.connect(streamed.folder / "state" / "online.db", isolation_level=None)
    lock.execute("BEGIN EXCLUSIVE")
    running = start("--from", "earliest", "--drain", "1", "--metrics-port", "0")
    address = running.address()
    # One reader waits in its put; which one comes first, and so who knows of its lag, is the runner's choice.
    running.wait(lambda: "\nvql_stream_lag_events{" in get(f"{address}/metrics")[1])
    assert get(f"{address}/readyz")[0] == 503

    running.process.send_signal(signal.SIGTERM)

    assert running.ends(10) == 5
    (given_up,) = [line for line in running.lines() if line["level"] == "error"]
    assert (given_up["event"], given_up["limit_s"]) == ("drain given up", 1.0)
    lock.execute("ROLLBACK")
    lock.close()
    assert streamed.committed() == 0
    assert start("--from", "earliest", "--until", "end").ends(60) == 0
    streamed.assert_complete(events, places)


@pytest.mark.beam
@pytest.mark.slow
def test_a_running_stream_answers_whether_it_is_well_and_how_far_it_is(
    streamed: Streamed, start: Callable[..., Running]
) -> None:
    streamed.produce(random_events(500, users=30))
    streamed.broker.produce(streamed.topic, [("u1", b"{")], partition=1)
    running = start("--from", "earliest", "--metrics-port", "0")
    address = running.address()
    running.wait(lambda: get(f"{address}/readyz")[0] == 200)
    running.wait(lambda: streamed.committed() == 501)
    # The client tells its statistics every five seconds.
    running.wait(lambda: "vql_kafka_brokers_up{" in get(f"{address}/metrics")[1])
    text = get(f"{address}/metrics")[1]
    assert sample(text, 'vql_stream_events_total{outcome="folded"}') == 500
    assert sample(text, 'vql_stream_dead_letters_total{reason="json"}') == 1
    assert sample(text, "vql_stream_event_to_visible_seconds_count") == 500
    assert sample(text, 'vql_stream_lag_events{partition="0"}') == 0
    assert sample(text, 'vql_stream_lag_seconds{partition="1"}') == 0
    assert sample(text, 'vql_kafka_brokers_up{partition="0"}') >= 1
    first_s = sample(text, "vql_stream_last_commit_timestamp_seconds")
    # An idle stream commits too, or it would look like one that hangs.
    running.wait(lambda: sample(get(f"{address}/metrics")[1], "vql_stream_last_commit_timestamp_seconds") > first_s)
    code, said = get(f"{address}/healthz")
    assert (code, json.loads(said)["store"]) == (200, "answers")
    running.process.send_signal(signal.SIGTERM)
    assert running.ends(20) == 0
    assert all({"time", "level", "event", "logger"} <= line.keys() for line in running.lines())
    assert len(running.lines()) == len(running.err.read_text().splitlines())


@pytest.mark.beam
@pytest.mark.slow
def test_shards_share_a_topic(streamed: Streamed, start: Callable[..., Running]) -> None:
    events = random_events(1000, users=30)
    places = streamed.produce(events)
    shards = [start("--from", "earliest", "--until", "end", "--shard", f"{index}/2") for index in (0, 1)]
    assert [shard.ends(90) for shard in shards] == [0, 0]
    assert [shard.folded_and_skipped()[0] for shard in shards] == [
        sum(partition == index for partition, _ in places) for index in (0, 1)
    ]
    streamed.assert_complete(events, places)


def test_a_share_is_said_in_one_of_two_ways() -> None:
    assert share_of(None, None) is None
    assert share_of("0,2", None) == (0, 2)
    assert share_of(None, "1/3") == Shard(index=1, count=3)


@pytest.mark.parametrize(
    ("partitions", "shard", "words"),
    [
        ("0", "0/2", "exclude each other"),
        (None, "3/3", "shard 3/3: shards of 3 are 0/3 to 2/3"),
        (None, "-1/3", "shards of 3 are 0/3 to 2/3"),
        (None, "0/0", "shard 0/0: N is to be 1 or more"),
        (None, "1", "is not as in I/N"),
        (None, "a/3", "'a' is not a whole number"),
        ("0,x", None, "'x' is not a whole number"),
    ],
)
def test_a_share_that_makes_no_sense_is_named(partitions: str | None, shard: str | None, words: str) -> None:
    with pytest.raises(InputError, match=words):
        share_of(partitions, shard)


def test_the_help_names_what_an_operator_sets() -> None:
    said = CliRunner().invoke(app, ["stream", "--help"], env={"COLUMNS": "200", "TERM": "dumb"}).output
    options = ("--metrics-port", "--metrics-host", "--shard", "--drain", "--log-level")
    assert [option for option in options if option not in said] == []
