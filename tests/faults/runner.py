"""Streams as processes that start in a moment: a server that has imported everything forks one for each start.

The stream is the product's `pipelines.stream.run` in a process of its own, that a kill -9 hits. The server runs in a
folder that holds the packages (the repository, or a copy with a change), and ends with its standard input. It speaks
JSON lines: a Job in and the process id out; a process id in and, once that process ended, its exit status out.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

REPOSITORY = Path(__file__).parents[2]
MODULES_OF_A_STREAM = (
    "apache_beam.runners.portability.fn_api_runner.fn_runner",
    "confluent_kafka.admin",
    "deltalake",
    "feature_repo.redis_store",
    "pipelines.stream",
    "tests.faults.full_batches",
    "tests.faults.redelivery",
)


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """A stream over a topic into a Redis, from its committed positions to the topic's end as of its start.

    copies_max: how often a batch is delivered at most (see tests.faults.redelivery); 0: as the source has it.
    full_batches: as tests.faults.full_batches says.
    """

    bootstrap_servers: str
    topic: str
    checkpoint: str
    redis_url: str
    folder: str
    redis_timeout_s: float = 5.0
    batch_size: int = 10_000
    bundle_s: float = 2.0
    copies_max: int = 0
    full_batches: bool = False
    seed: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Ended:
    """How a stream ended: 0, the exit code of its error, or minus the signal; its report where it has one."""

    code: int
    report: dict[str, Any]
    output: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Running:
    """A stream that was started. Its output and report are in files named by its process id."""

    streams: Streams
    pid: int
    folder: Path

    def kill(self) -> Ended:
        """End it as kill -9 does; it must not have ended before."""
        os.kill(self.pid, signal.SIGKILL)
        ended = self.wait()
        assert ended.code == -signal.SIGKILL, f"ended with {ended.code} before it was killed:\n{ended.output}"
        return ended

    def is_alive(self) -> bool:
        """Whether it still runs; an ended one stays a zombie until `wait`."""
        return "\nState:\tZ" not in Path(f"/proc/{self.pid}/status").read_text()

    def wait(self) -> Ended:
        code = self.streams.ask({"wait": self.pid})
        report, output = (self.folder / f"{self.pid}.{kind}" for kind in ("json", "out"))
        return Ended(
            code=code,
            report=msgspec.json.decode(report.read_bytes()) if report.exists() else {},
            # One that is killed as soon as it is started has not opened it yet.
            output=output.read_text() if output.exists() else "",
        )


class Streams:
    """The server, as seen by the tests."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def start(self, job: Job) -> Running:
        Path(job.folder).mkdir(exist_ok=True)
        return Running(streams=self, pid=self.ask({"start": job}), folder=Path(job.folder))

    def run(self, job: Job) -> Ended:
        return self.start(job).wait()

    def ask(self, question: dict[str, Any]) -> Any:
        assert self._process.stdin is not None
        self._process.stdin.write(msgspec.json.encode(question) + b"\n")
        self._process.stdin.flush()
        return self.answer()

    def answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        assert line, "the server of streams ended"
        return msgspec.json.decode(line)


@contextmanager
def running_streams(root: Path = REPOSITORY) -> Iterator[Streams]:
    """A server over the packages in root, for as long as the context lasts; with it end the streams it started."""
    # One thread, so that nothing but Python's own state is forked.
    environment = os.environ | {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.faults.runner"],
        cwd=root,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        streams = Streams(process)
        assert streams.answer() == str(root), "the packages come from elsewhere"
        yield streams
    finally:
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            pipe.close()
        process.wait()


def serve() -> None:
    """Answer until standard input ends."""
    root = _import_all()
    started: set[int] = set()
    _say(str(root))
    for line in sys.stdin.buffer:
        question = msgspec.json.decode(line)
        if "start" in question:
            pid = _fork(msgspec.convert(question["start"], Job))
            started.add(pid)
            _say(pid)
        else:
            _, status = os.waitpid(question["wait"], 0)
            started.discard(question["wait"])
            _say(os.waitstatus_to_exitcode(status))
    for pid in started:
        os.kill(pid, signal.SIGKILL)


def _import_all() -> Path:
    """Import what a stream needs, and compile or load its kernels; the folder that the packages come from."""
    for module in MODULES_OF_A_STREAM:
        __import__(module)
    from models import row

    _advance_twice()
    gc.freeze()
    return Path(row.__file__).parents[1]


def _advance_twice() -> None:
    """Once on a new row and once on one that was read: the kernels are compiled for each."""
    import numpy as np

    from models.cache import CacheSpec
    from models.item_table import ItemTable
    from models.row import Fold, advance, decode_row, encode_row, new_row
    from models.wire import Stamp, pack_recent

    spec = CacheSpec(checkpoint_id="00" * 16, groups=1, codewords=1, value_width=1, rate_HR=np.zeros((1, 1)))
    table = ItemTable(
        checkpoint_id=spec.checkpoint_id,
        index={},
        code_MG=np.zeros((1, 1), np.uint16),
        feature_MF=np.zeros((1, 1), np.int64),
        cell_MQ=np.zeros((1, 0), np.uint16),
        value_MHD=np.zeros((1, 1, 1), np.float32),
        action_value_AHD=np.zeros((1, 1, 1), np.float32),
    )
    one, zero = np.ones(1, np.int64), np.zeros(1, np.int64)
    row = new_row(spec, 1, 0)
    for offset_N in (zero, one):
        event = pack_recent(offset_N, one, zero, zero, one.astype(np.float32), zero)
        row, _ = advance(row, event, Stamp(epoch=1, partition=0, offset=-1), Fold(spec=spec, window=0, table=table))
        row = decode_row(encode_row(row), spec)
    assert row.count == 2


def _say(answer: Any) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(answer) + b"\n")
    sys.stdout.buffer.flush()


def _fork(job: Job) -> int:
    names = [(task / "comm").read_text().strip() for task in Path("/proc/self/task").iterdir()]
    # The allocators of pyarrow and deltalake each have a thread, and take care of it in a fork.
    others = [name for name in names if name != "jemalloc_bg_thd"]
    assert len(others) == 1, f"threads {others}: a fork would copy locks that nobody will release"
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        _redirect(Path(job.folder) / f"{os.getpid()}.out")
        code = _stream(job)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Without the server's clean-up: nothing of it is the child's.
        os._exit(code)


def _redirect(output: Path) -> None:
    to = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (to, 1), (to, 2)):
        os.dup2(source, target)


def _stream(job: Job) -> int:
    """Run the stream; its exit code, as the command line would have it."""
    from feature_repo.handle import StoreHandle
    from feature_repo.redis_settings import RedisSettings
    from models.errors import VqlError
    from pipelines import kafka_source, stream
    from pipelines.kafka_settings import kafka_settings
    from pipelines.kafka_topic import KafkaLog
    from tests.faults.full_batches import FullBatches
    from tests.faults.redelivery import RedeliveredRecords

    if job.full_batches:
        kafka_source.Consumer = FullBatches
    if job.copies_max:
        stream.ParseRecords = partial(RedeliveredRecords, job.copies_max, job.seed)
    folder = Path(job.folder)
    plan = stream.StreamPlan(
        log_path=folder / "no-log-of-files",
        checkpoint_path=Path(job.checkpoint),
        store=StoreHandle(state=folder, redis=RedisSettings(url=job.redis_url, timeout_s=job.redis_timeout_s)),
        dead_letters_path=folder / "dead_letters",
        kafka=KafkaLog(kafka=kafka_settings(bootstrap_servers=job.bootstrap_servers), topic=job.topic),
        batch_size=job.batch_size,
        bundle_s=job.bundle_s,
        poll_s=0.1,
    )
    try:
        report = stream.run(plan)
    except VqlError as error:
        traceback.print_exc()
        return error.exit_code
    (folder / f"{os.getpid()}.json").write_bytes(msgspec.json.encode(report))
    return 0


if __name__ == "__main__":
    serve()
