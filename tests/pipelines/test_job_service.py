"""The stream through a job service and its workers, all processes of their own: the rows are a plain fold's.

Prism stands for any job service. A job takes seconds to start, so the tests that only look share one service.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from models.checkpoint import Checkpoint
from models.errors import MachineError, StoreError
from pipelines.dead_letters import read_dead_letters
from pipelines.kafka_settings import kafka_settings
from pipelines.kafka_topic import KafkaLog
from pipelines.stream import StreamPlan, run
from pipelines.worker import forget_opened
from tests.jobs.processes import kill, start
from tests.kafka_broker import PASSWORD, USER, Broker
from tests.pipelines.faulty import FailingHandle
from tests.pipelines.small_log import read_rows
from tests.pipelines.test_kafka_source import USERS, assert_complete, produce, rows_of
from tests.prism import REPOSITORY, JobService, prism_binary, running_job_service
from tests.small import random_events, small_checkpoint

pytestmark = [pytest.mark.beam, pytest.mark.slow]

WAIT_S = 90.0


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[JobService]:
    with running_job_service(tmp_path_factory.mktemp("service")) as running:
        yield running


@pytest.fixture
def own_service(tmp_path: Path) -> Iterator[JobService]:
    """One to break."""
    with running_job_service(tmp_path / "service") as running:
        yield running


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def plan(broker: Broker, topic: str, checkpoint: Checkpoint, tmp_path: Path) -> StreamPlan:
    forget_opened()
    (tmp_path / "state").mkdir()
    return StreamPlan(
        log_path=tmp_path / "log" / "events",
        checkpoint_path=checkpoint.path,
        store=StoreHandle(state=tmp_path / "state"),
        dead_letters_path=tmp_path / "log" / "dead_letters",
        kafka=KafkaLog(kafka=kafka_settings(bootstrap_servers=broker.address), topic=topic),
        start="earliest",
        batch_size=100,
        poll_s=0.05,
    )


def assert_counted(figure: int, true: int) -> None:
    """Prism keeps one bundle's counters at most while it asks what they are named: those of another may be lost."""
    assert 0 < figure <= true


def streaming(service: JobService) -> list[str]:
    return ["--streaming", *service.options]


def test_the_command_line_hands_the_stream_to_a_job_service(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint, service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    events = random_events(1500, users=30)
    places = produce(broker, plan, events)

    # An option that only another job service knows is passed over.
    said = vql_stream(plan, [*service.options, "--checkpointing_interval=10000"], monkeypatch)

    assert said.returncode == 0, said.stderr
    folded = re.search(r"([\d,]+) events folded", said.stdout)
    assert folded is not None
    assert_counted(int(folded[1].replace(",", "")), 1500)
    assert_complete(plan, checkpoint, events, places)


def test_secrets_stay_in_their_files_and_figures_come_back(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint, service: JobService, tmp_path: Path
) -> None:
    events = random_events(600, users=30)
    places = produce(broker, plan, events[:300])
    broker.produce(plan.kafka.topic, [("u1", b"{")], partition=1)
    places += produce(broker, plan, events[300:])
    (tmp_path / "password").write_text(PASSWORD)
    secure = kafka_settings(
        bootstrap_servers=broker.secure_address,
        security_protocol="SASL_SSL",
        sasl_mechanism="PLAIN",
        sasl_username=USER,
        sasl_password_file=tmp_path / "password",
        ssl_ca_file=broker.ca,
    )

    report = run(replace(plan, kafka=replace(plan.kafka, kafka=secure)), streaming(service))

    assert_complete(plan, checkpoint, events, places)
    assert_counted(report.records_read, 601)
    assert_counted(report.events_folded, 600)
    assert_counted(report.unknown_items, sum(event.item_id.startswith("new") for event in events))
    assert [letter.reason for letter in read_dead_letters(plan.dead_letters_path)] == ["json"]
    assert PASSWORD not in service.said()


@pytest.mark.parametrize("calls", [0, 11])
def test_a_failing_put_is_one_clear_error_and_commits_nothing_unput(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint, service: JobService, calls: int
) -> None:
    events = random_events(1500, users=30)
    places = produce(broker, plan, events)
    failing = replace(plan, store=FailingHandle(real=plan.store, calls=calls), batch_size=10, bundle_s=0.05)

    with pytest.raises(StoreError, match=r"^the planted failure$"):
        run(failing, streaming(service))

    assert_nothing_unput_is_committed(plan, checkpoint)
    assert committed(plan, checkpoint) < 1500
    run(plan, streaming(service))
    assert_complete(plan, checkpoint, events, places)


def test_a_worker_killed_in_the_middle_is_said_and_the_next_start_completes_the_rows(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint, own_service: JobService
) -> None:
    events = random_events(1500, users=30)
    places = produce(broker, plan, events)
    killer = threading.Thread(
        target=when, args=(lambda: both_committed(plan, checkpoint), lambda: kill_each(own_service.workers()))
    )
    killer.start()

    # Prism seldom misses the end of a worker; after five minutes it is the job that does not answer.
    said = r"^(a worker ended in the middle |the job service at .* does not answer).*start again, the rows are sound"
    with pytest.raises(MachineError, match=said):
        run(replace(plan, batch_size=10, bundle_s=0.05, until="forever"), streaming(own_service))

    killer.join()
    assert_nothing_unput_is_committed(plan, checkpoint)
    report = run(replace(plan, start="resume"), streaming(own_service))
    assert report.records_read < 1500
    assert_complete(plan, checkpoint, events, places)


@pytest.mark.parametrize("pause_s", [0.0, 0.2])
def test_everything_killed_in_the_middle_leaves_rows_that_the_next_start_completes(
    broker: Broker,
    plan: StreamPlan,
    checkpoint: Checkpoint,
    own_service: JobService,
    monkeypatch: pytest.MonkeyPatch,
    pause_s: float,
) -> None:
    events = random_events(6000, users=30)
    places = produce(broker, plan, events[:300])
    stream = start(arguments(plan, "forever", own_service.options, monkeypatch), plan.log_path.parents[1])
    when(lambda: committed(plan, checkpoint) == 300)
    while committed(plan, checkpoint) < 900:
        places += produce(broker, plan, events[len(places) : len(places) + 50])
    time.sleep(pause_s)

    own_service.kill()
    kill(stream)

    assert_nothing_unput_is_committed(plan, checkpoint)
    places += produce(broker, plan, events[len(places) :])
    report = run(replace(plan, start="resume"))
    assert report.records_read <= 6000 - 900
    assert_complete(plan, checkpoint, events, places)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_cancels_an_endless_job_and_nothing_is_lost(
    broker: Broker,
    plan: StreamPlan,
    checkpoint: Checkpoint,
    service: JobService,
    monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:
    events = random_events(600, users=30)
    places = produce(broker, plan, events[:300])
    stream = start(arguments(plan, "forever", service.options, monkeypatch), plan.log_path.parents[1])
    when(lambda: committed(plan, checkpoint) == 300)

    stream.send_signal(number)

    assert stream.wait(WAIT_S) == 0
    when(lambda: service.workers() == [])
    places += produce(broker, plan, events[300:])
    report = run(replace(plan, start="resume"))
    assert (report.records_read, report.events_skipped) == (300, 0)
    assert_complete(plan, checkpoint, events, places)


def test_a_job_service_that_is_not_there_is_one_line(
    plan: StreamPlan, service: JobService, monkeypatch: pytest.MonkeyPatch
) -> None:
    nowhere = [*service.options, "--job_endpoint=127.0.0.1:1", "--job_server_timeout=2"]

    said = vql_stream(plan, nowhere, monkeypatch)

    assert said.returncode == MachineError.exit_code
    assert said.stderr.splitlines()[-1].startswith("vql: MachineError: the job service at 127.0.0.1:1 does not answer")
    assert "Traceback" not in said.stderr


def test_workers_that_are_not_there_are_one_line(plan: StreamPlan, own_service: JobService) -> None:
    """Prism ends when it cannot reach the pool."""
    with pytest.raises(MachineError, match=r"went away: see that it runs, and that it reaches .* 127\.0\.0\.1:1;"):
        run(plan, [*streaming(own_service), "--environment_config=127.0.0.1:1"])


def test_a_worker_without_our_code_is_one_line(
    broker: Broker, plan: StreamPlan, service: JobService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "known_only_here.py").write_text(
        "from tests.pipelines.faulty import FailingHandle as Faulty\nclass Handle(Faulty):\n    pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import known_only_here

    produce(broker, plan, random_events(10, users=30))

    with pytest.raises(MachineError, match=r"cannot import what they run \(No module named 'known_only_here'\)"):
        run(replace(plan, store=known_only_here.Handle(real=plan.store, calls=0)), streaming(service))


def test_prism_itself_runs_the_stream_with_workers_in_this_process(
    broker: Broker, plan: StreamPlan, checkpoint: Checkpoint
) -> None:
    events = random_events(600, users=30)
    places = produce(broker, plan, events)

    report = run(plan, ["--runner=PrismRunner", f"--prism_location={prism_binary()}", "--streaming"])

    assert_counted(report.events_folded, 600)
    assert report.conflicts == 0
    assert_complete(plan, checkpoint, events, places)


def arguments(
    plan: StreamPlan, until: str, options: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> list[str | Path]:
    """The command line of the plan, and its environment."""
    monkeypatch.setenv("VQL_KAFKA_BOOTSTRAP_SERVERS", plan.kafka.kafka.bootstrap_servers)
    log = plan.log_path.parent
    named = ["--checkpoint", plan.checkpoint_path, "--log", log, "--state", plan.store.state, "--from", plan.start]
    return ["stream", *named, "--topic", plan.kafka.topic, "--until", until, "--", *options]


def vql_stream(
    plan: StreamPlan, options: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> subprocess.CompletedProcess[str]:
    """`vql stream` to the topic's end."""
    command = [sys.executable, "-m", "jobs.cli", *map(str, arguments(plan, "end", options, monkeypatch))]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=WAIT_S, check=False)


def assert_nothing_unput_is_committed(plan: StreamPlan, checkpoint: Checkpoint) -> None:
    rows = rows_of(plan)
    put = dict.fromkeys((0, 1), -1)
    for row in read_rows(rows, checkpoint, USERS).values():
        put[row.stamp.partition] = max(put[row.stamp.partition], row.stamp.offset)
    positions = rows.positions(checkpoint.checkpoint_id)
    assert all(offset <= put[partition] for partition, (_, offset) in positions.items()), (positions, put)


def committed(plan: StreamPlan, checkpoint: Checkpoint) -> int:
    """How many records are committed."""
    return sum(offset + 1 for _, offset in rows_of(plan).positions(checkpoint.checkpoint_id).values())


def both_committed(plan: StreamPlan, checkpoint: Checkpoint) -> bool:
    return len(rows_of(plan).positions(checkpoint.checkpoint_id)) == 2


def when(reached: Callable[[], bool], then: Callable[[], None] = lambda: None) -> None:
    deadline_s = time.monotonic() + WAIT_S
    while not reached():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.02)
    then()


def kill_each(pids: Sequence[int]) -> None:
    assert pids, "there is no worker to kill"
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
