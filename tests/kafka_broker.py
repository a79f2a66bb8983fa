"""The product's local Kafka for tests, with a second listener: SASL over TLS (user USER, password PASSWORD)."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from confluent_kafka import KafkaError, Message, Producer

from jobs.jars import require_java
from jobs.local_servers import KAFKA_WAIT_S as START_WAIT_S
from jobs.local_servers import KafkaPorts, KafkaServer, free_ports, running_kafka

USER, PASSWORD = "vql", "a-secret-of-the-tests"
# Tests last for seconds: Java's second compiler would only take their time.
JVM = ("-XX:TieredStopAtLevel=1",)
_SECURE_LISTENER = """
listeners=PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{secure},CONTROLLER://127.0.0.1:{controller}
advertised.listeners=PLAINTEXT://127.0.0.1:{plain},SASL_SSL://127.0.0.1:{secure}
sasl.enabled.mechanisms=PLAIN
listener.name.sasl_ssl.plain.sasl.jaas.config=org.apache.kafka.common.security.plain.PlainLoginModule required \
  user_{user}="{password}";
ssl.keystore.location={folder}/broker.p12
ssl.keystore.password={password}
ssl.keystore.type=PKCS12
"""


@dataclass(frozen=True, kw_only=True)
class Broker(KafkaServer):
    """A running broker: also the address of its secure listener, and that one's certificate."""

    secure_address: str
    ca: Path

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
    ca = _make_certificate(folder)
    more = _SECURE_LISTENER.format(
        plain=plain, secure=secure, controller=controller, folder=folder, user=USER, password=PASSWORD
    )
    with running_kafka(folder, KafkaPorts(plain=plain, controller=controller), more, JVM) as server:
        yield Broker(address=server.address, secure_address=f"127.0.0.1:{secure}", ca=ca)


def _make_certificate(folder: Path) -> Path:
    """The broker's key and self-signed certificate; the certificate as a file that clients can trust."""
    keytool, store, ca = Path(require_java()).with_name("keytool"), folder / "broker.p12", folder / "ca.pem"
    common = ["-keystore", str(store), "-storepass", PASSWORD, "-storetype", "PKCS12", "-alias", "broker"]
    made = ["-genkeypair", "-keyalg", "EC", "-dname", "CN=127.0.0.1", "-ext", "san=ip:127.0.0.1", "-validity", "30"]
    for arguments in (made, ["-exportcert", "-rfc", "-file", str(ca)]):
        subprocess.run([str(keytool), *arguments, *common], check=True, capture_output=True)
    return ca
