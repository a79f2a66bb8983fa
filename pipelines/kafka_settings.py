"""How to reach Kafka: settings from the environment (VQL_KAFKA_...), secrets from files.

A secret is only ever named by its file, and read where a client is made. So the settings can be printed, and can
travel to the workers within the pipeline, which is written down in full by runners and job services.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.errors import InputError

# What librdkafka has to say (a broker that went away, a certificate that it does not trust) goes here.
KAFKA_LOG = logging.getLogger("vql.kafka")
_PREFIX = "VQL_KAFKA_"
_NOT_IN_JAAS = set('"\\\r\n')


class KafkaSettings(BaseSettings):
    """The cluster's address and how to authenticate; each field is the variable VQL_KAFKA_ and its name in capitals."""

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True)

    bootstrap_servers: str = Field(min_length=1)
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = "PLAINTEXT"
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = None
    sasl_username: str | None = None
    sasl_password_file: Path | None = None
    ssl_ca_file: Path | None = None
    ssl_certificate_file: Path | None = None
    ssl_key_file: Path | None = None
    ssl_key_password_file: Path | None = None
    timeout_s: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.security_protocol.startswith("SASL_"):
            missing = [n for n in ("sasl_mechanism", "sasl_username", "sasl_password_file") if getattr(self, n) is None]
            if missing:
                raise ValueError(f"{self.security_protocol} needs {', '.join(_PREFIX + n.upper() for n in missing)}")
        return self

    def client(self) -> dict[str, Any]:
        """librdkafka's options for any client, secrets included. Raises InputError for a file that cannot be read."""
        options = {
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": self.security_protocol,
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": self.sasl_username,
            "sasl.password": _secret(self.sasl_password_file),
            "ssl.ca.location": _readable(self.ssl_ca_file),
            "ssl.certificate.location": _readable(self.ssl_certificate_file),
            "ssl.key.location": _readable(self.ssl_key_file),
            "ssl.key.password": _secret(self.ssl_key_password_file),
            "logger": KAFKA_LOG,
        }
        return {name: value for name, value in options.items() if value is not None}

    def java_client(self) -> dict[str, str]:
        """The options of Java's client, in which a secret is only named: the client itself reads the file.

        Raises InputError for a file that cannot be read, or whose content Java's client would take for another.
        """
        options = {
            "bootstrap.servers": self.bootstrap_servers,
            "security.protocol": self.security_protocol,
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.jaas.config": self._jaas(),
            "ssl.truststore.type": None if self.ssl_ca_file is None else "PEM",
            "ssl.truststore.location": _readable(self.ssl_ca_file),
            "ssl.keystore.type": None if self.ssl_certificate_file is None else "PEM",
            "ssl.keystore.certificate.chain": _named(self.ssl_certificate_file),
            "ssl.keystore.key": _named(self.ssl_key_file),
            "ssl.key.password": _named_secret(self.ssl_key_password_file),
            "config.providers": "dir",
            "config.providers.dir.class": "org.apache.kafka.common.config.provider.DirectoryConfigProvider",
        }
        return {name: value for name, value in options.items() if value is not None}

    def _jaas(self) -> str | None:
        if self.sasl_mechanism is None or self.sasl_username is None:
            return None
        module = "plain.Plain" if self.sasl_mechanism == "PLAIN" else "scram.Scram"
        user, password = self.sasl_username, _named_secret(self.sasl_password_file)
        if set(user) & _NOT_IN_JAAS:
            raise InputError(f"{_PREFIX}SASL_USERNAME {user!r} holds a quote, a backslash or a line end")
        login = f"org.apache.kafka.common.security.{module}LoginModule"
        return f'{login} required username="{user}" password="{password}";'


def kafka_settings(**given: Any) -> KafkaSettings:
    """The settings of the environment; what is given counts more. Raises InputError naming the variable at fault."""
    try:
        return KafkaSettings(**given)
    except ValidationError as error:
        faults = [_PREFIX + "_".join(map(str, e["loc"])).upper() + ": " + e["msg"] for e in error.errors() if e["loc"]]
        faults += [e["msg"] for e in error.errors() if not e["loc"]]
        raise InputError(f"the settings of Kafka are incomplete or wrong: {'; '.join(faults)}") from error


def _readable(path: Path | None) -> str | None:
    if path is not None:
        _read(path)
    return None if path is None else str(path)


def _secret(path: Path | None) -> str | None:
    return None if path is None else _read(path).rstrip("\r\n")


def _named(path: Path | None) -> str | None:
    """What Java's client replaces by the file's content."""
    if path is not None:
        _read(path)
    return None if path is None else f"${{dir:{path.absolute().parent}:{path.name}}}"


def _named_secret(path: Path | None) -> str | None:
    if path is not None and set(_read(path)) & _NOT_IN_JAAS:
        raise InputError(
            f"the secret in {path} holds a line end, a quote or a backslash, which Java's client would read as another "
            "one; write it without (printf, not echo)"
        )
    return _named(path)


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file {path} of the settings of Kafka cannot be read: {error}") from error
