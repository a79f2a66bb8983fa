"""Real servers on 127.0.0.1 for benchmarks and tests: one Kafka node and one Redis, each ended by its process id.

Kafka (KRaft, one node) runs from the jars that pyspark's own Ivy fetches, Redis from the PATH. Both keep what they
keep in the folder that they are given, and end with the context that started them.
"""

from __future__ import annotations

import shutil
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import redis
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from jobs.jars import kafka_jars, require_java
from models.errors import MachineError

KAFKA_WAIT_S = 60.0
REDIS_WAIT_S = 20.0
MEMORY_ONLY = ("--save", "", "--appendonly", "no")
_CLUSTER_ID = "MkU3OEVBNTcwNTJENDM2Qg"
_JVM = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:-UsePerfData", "-Dorg.apache.logging.log4j.level=WARN")
_PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{plain},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL
inter.broker.listener.name=PLAINTEXT
log.dirs={folder}/log
auto.create.topics.enable=false
offsets.topic.num.partitions=1
offsets.topic.replication.factor=1
transaction.state.log.num.partitions=1
transaction.state.log.replication.factor=1
transaction.state.log.min.isr=1
group.initial.rebalance.delay.ms=0
num.network.threads=2
num.io.threads=2
"""


def free_ports(count: int) -> list[int]:
    """So many different ports that nobody listens on; held all at once while they are chosen."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()


def free_port() -> int:
    (port,) = free_ports(1)
    return port


@dataclass(frozen=True, kw_only=True)
class KafkaServer:
    """A running broker, by the address of its plain listener."""

    address: str

    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.address})

    def create_topic(self, name: str, partitions: int = 2, **config: str) -> str:
        """A topic that keeps every record: retention would look at the records' own, old, times."""
        new = NewTopic(name, partitions, 1, config={"retention.ms": "-1"} | config)
        admin = self.admin()
        admin.create_topics([new])[name].result(KAFKA_WAIT_S)
        _wait_until_led(admin, name, partitions)
        return name

    def delete_topic(self, name: str) -> None:
        admin = self.admin()
        admin.delete_topics([name])[name].result(KAFKA_WAIT_S)


@dataclass(frozen=True, kw_only=True, slots=True)
class KafkaPorts:
    """Where a broker listens."""

    plain: int
    controller: int


@contextmanager
def running_kafka(
    folder: Path, ports: KafkaPorts | None = None, more: str = "", jvm: Sequence[str] = ()
) -> Iterator[KafkaServer]:
    """A broker that answers, for as long as the context lasts.

    more: lines of server.properties, which win over the usual ones. Raises MachineError without Java or the jars, and,
    with the broker's own output, when it does not start.
    """
    if ports is None:
        plain, controller = free_ports(2)
        ports = KafkaPorts(plain=plain, controller=controller)
    properties = folder / "server.properties"
    properties.write_text(_PROPERTIES.format(plain=ports.plain, controller=ports.controller, folder=folder) + more)
    java = [require_java(), *_JVM, *jvm, "-cp", ":".join(str(jar) for jar in kafka_jars())]
    formatting = [*java, "kafka.tools.StorageTool", "format", "-t", _CLUSTER_ID, "-c", str(properties)]
    subprocess.run(formatting, check=True, capture_output=True)
    output = folder / "broker.out"
    with output.open("wb") as file:
        process = subprocess.Popen([*java, "kafka.Kafka", str(properties)], stdout=file, stderr=file)
    try:
        server = KafkaServer(address=f"127.0.0.1:{ports.plain}")
        _wait_until_it_answers(server, process, output)
        yield server
    finally:
        process.kill()
        process.wait()


def _wait_until_it_answers(server: KafkaServer, process: subprocess.Popen[bytes], output: Path) -> None:
    admin = AdminClient({"bootstrap.servers": server.address, "log_level": 0})
    deadline_s = time.monotonic() + KAFKA_WAIT_S
    while True:
        try:
            admin.list_topics(timeout=1.0)
            return
        except KafkaException as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise MachineError(f"the Kafka broker does not answer ({error}):\n{output.read_text()}") from error


def _wait_until_led(admin: AdminClient, name: str, partitions: int) -> None:
    """The broker says that a topic is made before every partition has its leader."""
    asked = {TopicPartition(name, p): OffsetSpec.latest() for p in range(partitions)}
    deadline_s = time.monotonic() + KAFKA_WAIT_S
    while True:
        try:
            for answer in admin.list_offsets(asked, request_timeout=KAFKA_WAIT_S).values():
                answer.result(KAFKA_WAIT_S)
            return
        except KafkaException:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.05)


@dataclass
class RedisServer:
    """A Redis at a fixed address, running or not; it can be ended and started again there.

    username: whom `client` is, of the users that the options name; without one, the password is the default user's.
    tls_ca: it speaks TLS alone, with the certificate that the options name and this file vouches for.
    """

    folder: Path
    port: int
    options: Sequence[str] = MEMORY_ONLY
    password: str | None = None
    username: str | None = None
    tls_ca: Path | None = None
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    @property
    def url(self) -> str:
        return f"redis{'s' if self.tls_ca else ''}://127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """A client beside the store."""
        options: dict[str, Any] = {"username": self.username, "password": self.password}
        if self.tls_ca is not None:
            options["ssl_ca_certs"] = str(self.tls_ca)
        return redis.Redis.from_url(self.url, socket_timeout=REDIS_WAIT_S, **options)

    def start(self) -> None:
        """Raises MachineError where redis-server is not installed, and, with its output, when it does not answer."""
        output = self.folder / "redis.out"
        ports = ["--port", str(self.port)] if self.tls_ca is None else ["--port", "0", "--tls-port", str(self.port)]
        named = ["--bind", "127.0.0.1", *ports, "--dir", str(self.folder), "--loglevel", "warning"]
        secret = [] if self.password is None or self.username else ["--requirepass", self.password]
        command = [require_redis(), *named, *secret, *self.options]
        with output.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file)
        deadline_s = time.monotonic() + REDIS_WAIT_S
        while True:
            try:
                with self.client() as client:
                    client.ping()
                return
            except redis.ConnectionError as error:
                if self.process.poll() is not None or time.monotonic() > deadline_s:
                    raise MachineError(f"redis-server does not answer ({error}):\n{output.read_text()}") from error
                time.sleep(0.02)

    def stop(self) -> None:
        """End it in good order, or not at all politely if it does not listen."""
        if self.process is None:
            return
        self.process.terminate()
        try:
            self.process.wait(REDIS_WAIT_S)
        except subprocess.TimeoutExpired:
            self.kill()
        self.process = None

    def kill(self) -> None:
        """End it as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


@contextmanager
def running_redis(
    folder: Path, options: Sequence[str] = MEMORY_ONLY, password: str | None = None, **more: Any
) -> Iterator[RedisServer]:
    """A server that answers, for as long as the context lasts. more: of RedisServer, and as RedisServer.start."""
    server = RedisServer(folder=folder, port=free_port(), options=options, password=password, **more)
    try:
        server.start()
        yield server
    finally:
        server.stop()


def require_redis() -> str:
    """The path of redis-server. Raises MachineError where there is none."""
    path = shutil.which("redis-server")
    if path is None:
        raise MachineError("redis-server is not on the PATH: install Redis 6.2 or newer")
    return path
