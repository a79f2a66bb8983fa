"""A real Spark standalone cluster on 127.0.0.1, for benchmarks and tests: a master and workers from pyspark's jars.

Each is a process, and each worker starts an executor of one core as a process of its own, as it would on another
machine. All end with the context that started them.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyspark

from jobs.jars import require_java
from jobs.local_servers import free_ports
from models.errors import MachineError

CLUSTER_WAIT_S = 120.0
END_WAIT_S = 30.0
SPARK_HOME = Path(pyspark.__file__).parent
SOURCES = Path(__file__).parent.parent
# Of master and workers, which do little.
_JVM = ("-Xmx256m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-XX:TieredStopAtLevel=1")
# Else a master would serve at one port more, always the same.
_NO_REST = "-Dspark.master.rest.enabled=false"
# For a driver of this cluster, whoever starts it.
_DEFAULTS = """
spark.driver.host 127.0.0.1
spark.driver.bindAddress 127.0.0.1
spark.executor.memory {memory_mb}m
spark.executor.extraJavaOptions -XX:+UseSerialGC -XX:-UsePerfData
spark.driver.extraJavaOptions -XX:+UseSerialGC -XX:-UsePerfData
spark.sql.shuffle.partitions 4
spark.databricks.delta.snapshotPartitions 2
"""


@dataclass(frozen=True, kw_only=True)
class SparkCluster:
    """A running cluster: its address, and what the environment of its drivers has to say."""

    master: str
    environment: dict[str, str]
    workers: tuple[psutil.Process, ...]

    def executors(self) -> list[psutil.Process]:
        """The executors that run now: Java processes, whose children are Python."""
        return [child for worker in self.workers for child in worker.children() if child.name() == "java"]


@contextmanager
def running_cluster(folder: Path, workers: int = 2, memory_mb: int = 1024) -> Iterator[SparkCluster]:
    """A cluster with so many workers, whose executors have this much memory (Java's heap; Python's is beside it).

    Raises MachineError without Java, and with its own output for a master or worker that does not start.
    """
    port, ui, *worker_uis = free_ports(2 + workers)
    master = f"spark://127.0.0.1:{port}"
    (folder / "conf").mkdir()
    (folder / "conf" / "spark-defaults.conf").write_text(_DEFAULTS.format(memory_mb=memory_mb))
    driver = {
        "SPARK_HOME": str(SPARK_HOME),
        "SPARK_CONF_DIR": str(folder / "conf"),
        "SPARK_LOCAL_IP": "127.0.0.1",
        "SPARK_LOCAL_DIRS": str(folder / "local"),
    }
    paths = [str(SOURCES), *filter(None, [os.environ.get("PYTHONPATH")])]
    daemon = {
        # Spark's own scripts tell a worker, which starts executors by it.
        "SPARK_SCALA_VERSION": "2.13",
        # Executors have it from their worker.
        "PYTHONPATH": os.pathsep.join(paths),
    }
    environment = os.environ | driver | daemon
    java = [require_java(), *_JVM, _NO_REST, "-cp", f"{SPARK_HOME / 'jars'}/*"]
    with ExitStack() as ending:

        def started(name: str, *arguments: str) -> psutil.Process:
            command = [*java, f"org.apache.spark.deploy.{name}", *arguments]
            with (folder / "cluster.out").open("ab") as out:
                process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)
            ending.callback(_end, process)
            return psutil.Process(process.pid)

        host = ("--host", "127.0.0.1")
        begun = [started("master.Master", *host, "--port", str(port), "--webui-port", str(ui))]
        _wait_for(lambda: _answer(ui) is not None, begun, folder)
        share = ("-c", "1", "-m", f"{memory_mb}m", "-d", str(folder / "work"))
        for worker_ui in worker_uis:
            begun.append(started("worker.Worker", *host, *share, "--webui-port", str(worker_ui), master))
        _wait_for(lambda: (_answer(ui) or {}).get("aliveworkers") == workers, begun, folder)
        yield SparkCluster(master=master, environment=driver, workers=tuple(begun[1:]))


def _answer(port: int) -> dict | None:
    """What the master says of itself; None before it can."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json/", timeout=5) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def _wait_for(done: Callable[[], bool], processes: list[psutil.Process], folder: Path) -> None:
    deadline_s = time.monotonic() + CLUSTER_WAIT_S
    while not done():
        if time.monotonic() > deadline_s or not all(process.is_running() for process in processes):
            raise MachineError(f"the Spark cluster does not start:\n{(folder / 'cluster.out').read_text()}")
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a daemon and what it started: a worker's executors, and their Python."""
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(END_WAIT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _, left = psutil.wait_procs(family, timeout=END_WAIT_S)
    for each in left:
        each.kill()
