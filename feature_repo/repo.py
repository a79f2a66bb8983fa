"""The Feast repo as the rest of the product uses it: open it, register a checkpoint, get at the fenced store."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from feast import FeatureStore
from feast.errors import FeastError
from feast.repo_config import FeastConfigError
from pydantic import ValidationError

from feature_repo.handle import PACKAGED_REPO, open_rows, read_config
from feature_repo.redis_settings import chosen_redis
from feature_repo.store import RowStore
from feature_repo.views import declare
from models.errors import InputError
from models.files import disk_error


def open_repo(state: Path, repo: Path = PACKAGED_REPO) -> FeatureStore:
    """Feast on this state folder, which is made if need be; sets VQL_STATE for this process and its children.

    Raises InputError naming feature_store.yaml when it is missing or cannot be used.
    """
    state = state.absolute()
    open_rows(read_config(state, repo)["online_store"], chosen_redis())
    try:
        state.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(error, state) from error
    os.environ["VQL_STATE"] = str(state)
    try:
        return FeatureStore(repo_path=str(repo.absolute()))
    except (FeastConfigError, FeastError, ValidationError) as error:
        raise InputError(f"Feast refuses {repo / 'feature_store.yaml'}: {error}") from error


def register(store: FeatureStore, checkpoint_id: str) -> None:
    """Add the checkpoint's view and service to the registry; what is registered already stays."""
    objects = declare(checkpoint_id)
    # Feast rewrites its whole registry file without a lock: two registrations at once would lose one.
    with Path(os.environ["VQL_STATE"], "registry.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store.refresh_registry()
        store.apply(objects)
        store.refresh_registry()


def rows_of(store: FeatureStore) -> RowStore:
    """The fenced store that this repo's feature_store.yaml and VQL_REDIS_URL name."""
    return open_rows(store.config.online_store.model_dump(), chosen_redis())
