"""How to reach Redis: settings from the environment (VQL_REDIS_...), the password from a file.

The password is only ever named by its file, and read where a client is made. So the settings can be printed, and can
travel to workers and executors, which then use the same store whatever their own environment says.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlsplit

from pydantic import Field, ValidationError, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from models.errors import InputError

_PREFIX = "VQL_REDIS_"
_SCHEMES = ("redis", "rediss", "unix")


class RedisSettings(BaseSettings):
    """The server's address and how to authenticate; each field is the variable VQL_REDIS_ and its name in capitals.

    url: redis://host:port/database, rediss:// for TLS, unix:///path. timeout_s bounds each connect, send and receive,
    and a call is tried 1 + retries times. ttl_s: seconds after its last write at which a row expires, default never.
    """

    model_config = SettingsConfigDict(env_prefix=_PREFIX, frozen=True)

    url: str
    username: str | None = None
    password_file: Path | None = None
    ssl_ca_file: Path | None = None
    timeout_s: float = Field(default=5.0, gt=0)
    retries: int = Field(default=3, ge=0)
    ttl_s: float | None = Field(default=None, gt=0)

    @field_validator("url")
    @classmethod
    def _url_has_no_secret(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in _SCHEMES or not (parts.netloc or parts.scheme == "unix"):
            raise ValueError("it must be redis://host:port/database, rediss://... or unix:///path")
        if "@" in parts.netloc or parts.query:
            # Not named in the message: it may be the password.
            raise ValueError(f"no user, password or options in it; use {_PREFIX}USERNAME and {_PREFIX}PASSWORD_FILE")
        return url

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.username is not None and self.password_file is None:
            raise ValueError(f"a user name needs {_PREFIX}PASSWORD_FILE")
        if self.ssl_ca_file is not None and not self.url.startswith("rediss:"):
            raise ValueError(f"{_PREFIX}SSL_CA_FILE needs a rediss:// address")
        return self

    def client(self) -> dict[str, Any]:
        """redis-py's options, the password included. Raises InputError for a file that cannot be read."""
        options = {
            "username": self.username,
            "password": None if self.password_file is None else _read(self.password_file).rstrip("\r\n"),
            "socket_timeout": self.timeout_s,
            "socket_connect_timeout": self.timeout_s,
        }
        if self.ssl_ca_file is not None:
            _read(self.ssl_ca_file)
            options["ssl_ca_certs"] = str(self.ssl_ca_file)
        return {name: value for name, value in options.items() if value is not None}


def redis_settings(**given: Any) -> RedisSettings:
    """The settings of the environment; what is given counts more. Raises InputError naming the variable at fault."""
    try:
        return RedisSettings(**given)
    except ValidationError as error:
        faults = [_PREFIX + "_".join(map(str, e["loc"])).upper() + ": " + e["msg"] for e in error.errors() if e["loc"]]
        faults += [e["msg"] for e in error.errors() if not e["loc"]]
    # Outside the handler: pydantic's own error quotes the values, and an address may have a password in it.
    raise InputError(f"the settings of Redis are incomplete or wrong: {'; '.join(faults)}")


def chosen_redis() -> RedisSettings | None:
    """The settings, where VQL_REDIS_URL is set; None: the embedded store. Raises InputError."""
    return redis_settings() if os.environ.get(f"{_PREFIX}URL") else None


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file {path} of the settings of Redis cannot be read: {error}") from error
