"""A real Kafka broker for tests: one KRaft node on 127.0.0.1, from the jars that pyspark's own Ivy resolves.

It has a plain listener and one with SASL over TLS (user USER, password PASSWORD, certificate `ca`). It keeps its log
in the folder it is given and ends with the process that started it.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaError, KafkaException, Message, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic, OffsetSpec

from jobs.jars import kafka_jars, require_java
from tests.servers import free_ports

USER, PASSWORD = "vql", "a-secret-of-the-tests"
START_WAIT_S = 60.0
CLUSTER_ID = "MkU3OEVBNTcwNTJENDM2Qg"
# Tests last for seconds: Java's second compiler would only take their time.
JVM = ("-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-XX:-UsePerfData")
WARNINGS_ONLY = "-Dorg.apache.logging.log4j.level=WARN"
_PROPERTIES = """
process.roles=broker,controller
node.id=1
controller.quorum.voters=1@127.0.0.1:{controller}
controller.listener.names=CONTROLLER
listeners=PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{secure},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{secure}
listener.security.protocol.map=CONTROLLER:PLAINTEXT,PLAINTEXT:PLAINTEXT,SASL_SSL:SASL_SSL
inter.broker.listener.name=PLAINTEXT
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_{user}="{password}";
ssl.keystore.location={folder}/broker.p12
ssl.keystore.password={password}
ssl.keystore.type=PKCS12
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Broker:
    """A running broker: the address of its plain listener, that of its secure one, and the latter's certificate."""

    address: str
    secure_address: str
    ca: Path

    def admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.address})

    def create_topic(self, name: str, partitions: int = 2, **config: str) -> str:
        """A topic that keeps every record: retention would look at the records' own, old, times."""
        new = NewTopic(name, partitions, 1, config={"retention.ms": "-1"} | config)
        admin = self.admin()
        admin.create_topics([new])[name].result(START_WAIT_S)
        self._wait_until_led(admin, name, partitions)
        return name

    def _wait_until_led(self, admin: AdminClient, name: str, partitions: int) -> None:
        """The broker says that a topic is made before every partition has its leader."""
        asked = {TopicPartition(name, p): OffsetSpec.latest() for p in range(partitions)}
        deadline_s = time.monotonic() + START_WAIT_S
        while True:
            try:
                for answer in admin.list_offsets(asked, request_timeout=START_WAIT_S).values():
                    answer.result(START_WAIT_S)
                return
            except KafkaException:
                if time.monotonic() > deadline_s:
                    raise
                time.sleep(0.05)

    def delete_topic(self, name: str) -> None:
        admin = self.admin()
        admin.delete_topics([name])[name].result(START_WAIT_S)

    def produce(
        self, topic: str, records: Sequence[tuple[str | None, bytes | None]], partition: int = -1
    ) -> list[tuple[int, int]]:
        """Append (key, value) records, to the partition that the default partitioner gives or to the one named.

        The partition and offset that each one got.
        """
        return send(Producer({"bootstrap.servers": self.address, "linger.ms": 5}), topic, records, partition)


def send(
    producer: Producer, topic: str, records: Sequence[tuple[str | None, bytes | None]], partition: int = -1
) -> list[tuple[int, int]]:
    """Produce records and wait until all are there; the partition and offset of each."""
    places: dict[int, tuple[int, int]] = {}

    def placed(number: int) -> Callable[[KafkaError | None, Message], None]:
        def done(error: KafkaError | None, message: Message) -> None:
            assert error is None, error
            places[number] = (message.partition(), message.offset())

        return done

    for number, (key, value) in enumerate(records):
        producer.produce(topic, key=key, value=value, partition=partition, on_delivery=placed(number))
        producer.poll(0)
    assert producer.flush(START_WAIT_S) == 0, f"topic {topic} did not take all records"
    return [places[number] for number in range(len(records))]


@contextmanager
def running_broker(folder: Path) -> Iterator[Broker]:
    """A broker that answers, for as long as the context lasts. Its output is shown when it does not start."""
    plain, secure, controller = free_ports(3)
    properties = folder / "server.properties"
    properties.write_text(
        _PROPERTIES.format(
            plain=plain, secure=secure, controller=controller, folder=folder, user=USER, password=PASSWORD
        )
    )
    ca = _make_certificate(folder)
    java = [require_java(), *JVM, WARNINGS_ONLY, "-cp", ":".join(str(jar) for jar in kafka_jars())]
    formatting = [*java, "kafka.tools.StorageTool", "format", "-t", CLUSTER_ID, "-c", str(properties)]
    subprocess.run(formatting, check=True, capture_output=True)
    output = folder / "broker.out"
    with output.open("wb") as file:
        process = subprocess.Popen([*java, "kafka.Kafka", str(properties)], stdout=file, stderr=file)
    try:
        broker = Broker(address=f"127.0.0.1:{plain}", secure_address=f"127.0.0.1:{secure}", ca=ca)
        _wait_until_it_answers(broker, process, output)
        yield broker
    finally:
        process.kill()
        process.wait()


def _wait_until_it_answers(broker: Broker, process: subprocess.Popen[bytes], output: Path) -> None:
    admin = AdminClient({"bootstrap.servers": broker.address, "log_level": 0})
    deadline_s = time.monotonic() + START_WAIT_S
    while True:
        try:
            admin.list_topics(timeout=1.0)
            return
        except KafkaException as error:
            if process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"the broker does not answer ({error}):\n{output.read_text()}") from error


def _make_certificate(folder: Path) -> Path:
    """The broker's key and self-signed certificate; the certificate as a file that clients can trust."""
    keytool, store, ca = Path(require_java()).with_name("keytool"), folder / "broker.p12", folder / "ca.pem"
    common = ["-keystore", str(store), "-storepass", PASSWORD, "-storetype", "PKCS12", "-alias", "broker"]
    made = ["-genkeypair", "-keyalg", "EC", "-dname", "CN=127.0.0.1", "-ext", "san=ip:127.0.0.1", "-validity", "30"]
    for arguments in (made, ["-exportcert", "-rfc", "-file", str(ca)]):
        subprocess.run([str(keytool), *arguments, *common], check=True, capture_output=True)
    return ca
