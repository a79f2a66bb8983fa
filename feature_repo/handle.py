"""From the state folder, feature_store.yaml and VQL_REDIS_URL to the fenced store, without importing Feast.

Importing Feast takes seconds and half a gigabyte; stream workers, Spark executors and rankers need neither.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from string import Template
from typing import Any

import yaml

from feature_repo.redis_settings import RedisSettings, chosen_redis
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowStore
from models.errors import InputError

PACKAGED_REPO = Path(__file__).parent
FENCED_STORE = "feature_repo.online_store.FencedOnlineStore"
# A connection has to be made in this time too, which may take longer than a ranker waits for rows.
READ_TIMEOUT_S_MIN = 0.25


@dataclass(frozen=True, kw_only=True, slots=True)
class StoreHandle:
    """Where the store is: a small value to send to workers, each of which opens it for itself.

    redis: chosen where the handle is made; a worker whose environment lacks VQL_REDIS_URL must not open another store.
    """

    state: Path
    repo: Path = PACKAGED_REPO
    redis: RedisSettings | None = field(default_factory=chosen_redis)

    def open(self) -> RowStore:
        """Raises InputError for an unusable feature_store.yaml or a secret's file that cannot be read."""
        return open_rows(read_config(self.state, self.repo)["online_store"], self.redis)

    def for_reader(self, deadline_s: float) -> StoreHandle:
        """The same store for a reader that waits so long: calls that it has given up end soon, and are not repeated."""
        if self.redis is None:
            return self
        timeout_s = min(self.redis.timeout_s, max(READ_TIMEOUT_S_MIN, 2 * deadline_s))
        return replace(self, redis=self.redis.model_copy(update={"timeout_s": timeout_s, "retries": 0}))


def read_config(state: Path, repo: Path = PACKAGED_REPO) -> dict[str, Any]:
    """The repo's feature_store.yaml with its variables filled in. Raises InputError naming the file."""
    path = repo / "feature_store.yaml"
    try:
        text = path.read_text()
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}); name a folder with a Feast repo") from error
    variables = os.environ | {"VQL_STATE": str(state.absolute())}
    try:
        config = yaml.safe_load(Template(text).safe_substitute(variables))
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not YAML: {error}; compare it with {PACKAGED_REPO / path.name}") from error
    if not isinstance(config, dict) or not isinstance(config.get("online_store"), dict):
        raise InputError(f"{path} has no section online_store; compare it with {PACKAGED_REPO / path.name}")
    return config


def open_rows(online_store: Mapping[str, Any], redis: RedisSettings | None) -> RowStore:
    """The store that this online_store section describes, on Redis where settings are given.

    The section's ttl_s counts unless the settings have one. Raises InputError for a section whose store has no fence.
    """
    kind = online_store.get("type")
    if kind != FENCED_STORE:
        raise InputError(f"online store type {kind!r} has no fence: set online_store.type to {FENCED_STORE}")
    if redis is not None:
        # Imported only where it is used: the client takes a quarter of a second.
        from feature_repo.redis_store import RedisRows

        ttl_s = online_store.get("ttl_s") if redis.ttl_s is None else redis.ttl_s
        return RedisRows(redis.model_copy(update={"ttl_s": ttl_s}))
    if not isinstance(online_store.get("path"), str):
        raise InputError("online_store.path is missing from feature_store.yaml: name the store's file")
    return SqliteRows(absolute_path(online_store["path"]), online_store.get("ttl_s"))


def absolute_path(path: str) -> Path:
    """Raises InputError for a path that depends on where a program was started, or on a variable that is not set."""
    if "${" in path:
        raise InputError(f"the store's path is {path}: set the variable, for VQL_STATE to the state folder")
    if not Path(path).is_absolute():
        raise InputError(f"the store's path {path} is relative; make it, or VQL_STATE, absolute")
    return Path(path)
