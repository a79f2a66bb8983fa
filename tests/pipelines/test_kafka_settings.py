from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from models.errors import InputError
from pipelines.kafka_settings import KafkaSettings, kafka_settings

SECRET = "correct-horse"


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for field in KafkaSettings.model_fields:
        monkeypatch.delenv(f"VQL_KAFKA_{field.upper()}", raising=False)


def with_sasl(monkeypatch: pytest.MonkeyPatch, password_file: Path) -> None:
    monkeypatch.setenv("VQL_KAFKA_BOOTSTRAP_SERVERS", "a:1,b:2")
    monkeypatch.setenv("VQL_KAFKA_SECURITY_PROTOCOL", "SASL_SSL")
    monkeypatch.setenv("VQL_KAFKA_SASL_MECHANISM", "SCRAM-SHA-512")
    monkeypatch.setenv("VQL_KAFKA_SASL_USERNAME", "streamer")
    monkeypatch.setenv("VQL_KAFKA_SASL_PASSWORD_FILE", str(password_file))


def test_settings_come_from_the_environment_and_secrets_from_their_files(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "password").write_text(f"{SECRET}\n")
    (tmp_path / "ca.pem").write_text("a certificate")
    with_sasl(monkeypatch, tmp_path / "password")
    monkeypatch.setenv("VQL_KAFKA_SSL_CA_FILE", str(tmp_path / "ca.pem"))

    client = kafka_settings().client()

    client.pop("logger")
    assert client == {
        "bootstrap.servers": "a:1,b:2",
        "security.protocol": "SASL_SSL",
        "sasl.mechanism": "SCRAM-SHA-512",
        "sasl.username": "streamer",
        "sasl.password": SECRET,
        "ssl.ca.location": str(tmp_path / "ca.pem"),
    }


def test_secrets_are_in_nothing_that_is_printed_or_sent(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "password").write_text(SECRET)
    with_sasl(monkeypatch, tmp_path / "password")
    settings = kafka_settings()
    settings.client()

    assert SECRET not in repr(settings)
    assert SECRET not in str(settings.model_dump())
    assert SECRET.encode() not in pickle.dumps(settings)


def test_settings_are_the_same_settings_after_their_way_to_a_worker() -> None:
    settings = kafka_settings(bootstrap_servers="a:1")

    assert pickle.loads(pickle.dumps(settings)) == settings
    assert hash(pickle.loads(pickle.dumps(settings))) == hash(settings)


def test_a_missing_address_is_named_by_its_variable() -> None:
    with pytest.raises(InputError, match="VQL_KAFKA_BOOTSTRAP_SERVERS: Field required"):
        kafka_settings()


def test_a_protocol_that_does_not_exist_is_refused() -> None:
    with pytest.raises(InputError, match="VQL_KAFKA_SECURITY_PROTOCOL: Input should be 'PLAINTEXT', 'SSL'"):
        kafka_settings(bootstrap_servers="a:1", security_protocol="TLS")


def test_sasl_without_a_name_or_password_is_refused_before_anything_connects() -> None:
    with pytest.raises(InputError, match="SASL_SSL needs VQL_KAFKA_SASL_USERNAME, VQL_KAFKA_SASL_PASSWORD_FILE"):
        kafka_settings(bootstrap_servers="a:1", security_protocol="SASL_SSL", sasl_mechanism="PLAIN")


@pytest.mark.parametrize("field", ["sasl_password_file", "ssl_ca_file", "ssl_key_file"])
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, field: str) -> None:
    with pytest.raises(InputError, match=f"{tmp_path}/nowhere.*cannot be read"):
        kafka_settings(bootstrap_servers="a:1", **{field: tmp_path / "nowhere"}).client()


def test_javas_client_gets_the_secrets_by_their_files_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("password", "ca.pem", "certificate.pem", "key.pem", "key-password"):
        (tmp_path / name).write_text(SECRET)
    with_sasl(monkeypatch, tmp_path / "password")
    for field in ("ca", "certificate", "key"):
        monkeypatch.setenv(f"VQL_KAFKA_SSL_{field.upper()}_FILE", str(tmp_path / f"{field}.pem"))
    monkeypatch.setenv("VQL_KAFKA_SSL_KEY_PASSWORD_FILE", str(tmp_path / "key-password"))

    client = kafka_settings().java_client()

    assert SECRET not in str(client)
    assert client["sasl.jaas.config"] == (
        "org.apache.kafka.common.security.scram.ScramLoginModule required "
        f'username="streamer" password="${{dir:{tmp_path}:password}}";'
    )
    assert client["ssl.keystore.key"] == f"${{dir:{tmp_path}:key.pem}}"
    assert client["ssl.truststore.location"] == str(tmp_path / "ca.pem")


def test_javas_client_of_a_plain_cluster_is_told_no_more_than_needed() -> None:
    client = kafka_settings(bootstrap_servers="a:1").java_client()
    assert {name for name in client if not name.startswith("config.")} == {"bootstrap.servers", "security.protocol"}


@pytest.mark.parametrize("secret", [f"{SECRET}\n", 'quo"ted', "back\\slash"])
def test_a_secret_that_javas_client_would_misread_is_refused_without_showing_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, secret: str
) -> None:
    (tmp_path / "password").write_text(secret)
    with_sasl(monkeypatch, tmp_path / "password")
    with pytest.raises(InputError, match="password holds a line end, a quote or a backslash") as refusal:
        kafka_settings().java_client()
    assert secret not in str(refusal.value)
