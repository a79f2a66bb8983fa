"""The fenced store as one of Feast's online stores: Feast's own reads, pushes and `apply` go through the fence too.

It serves the feature views of `views.declare` alone: entity `user`, the Bytes features `folded` and `recent`, the
checkpoint's id in a tag. Stamps and times are read from the bytes, so what Feast was told about time is not used.
Found by Feast by class path; Feast wants the config class beside it under this name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import Any

from feast import Entity, FeatureView, RepoConfig
from feast.infra.online_stores.online_store import OnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.repo_config import FeastConfigBaseModel
from pydantic import field_validator

from feature_repo.handle import FENCED_STORE, absolute_path, open_rows
from feature_repo.redis_settings import chosen_redis
from feature_repo.store import RowPut, RowStore
from models.errors import InputError, WireError
from models.row import RowBytes
from models.wire import FOLDED_MAGIC, RECENT_MAGIC, read_header

FEATURES = ("folded", "recent")
CHECKPOINT_TAG = "checkpoint_id"

_log = logging.getLogger(__name__)


class FencedOnlineStoreConfig(FeastConfigBaseModel):
    """The section online_store of feature_store.yaml; `path` is the embedded store's, where Redis is not chosen."""

    type: str = FENCED_STORE
    path: str
    ttl_s: float | None = None

    @field_validator("path")
    @classmethod
    def _path_is_absolute(cls, path: str) -> str:
        return str(absolute_path(path))


class FencedOnlineStore(OnlineStore):
    """Feast's online store on the fenced one: Redis where VQL_REDIS_URL is set, else the embedded store."""

    def __init__(self) -> None:
        self._rows: RowStore | None = None

    def online_write_batch(
        self,
        config: RepoConfig,
        table: FeatureView,
        data: list[tuple[EntityKey, dict[str, Value], datetime, datetime | None]],
        progress: Callable[[int], Any] | None,
    ) -> None:
        """Put what is newer than the store's rows. Raises WireError for bytes that are no row of this checkpoint."""
        checkpoint_id = checkpoint_of(table)
        puts = [_put(checkpoint_id, _user_id(key), values) for key, values, _, _ in data]
        written = self.rows(config).put_rows(checkpoint_id, puts)
        refused = written.count(False)
        if refused:
            _log.info("%s: %d of %d rows were not newer than the store's, left as is", table.name, refused, len(puts))
        if progress is not None:
            progress(len(puts))

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[tuple[datetime | None, dict[str, Value] | None]]:
        """Bytes as they are stored, with the time of the user's newest event; (None, None) for absent users."""
        rows = self.rows(config).get_rows(checkpoint_of(table), [_user_id(key) for key in entity_keys])
        names = FEATURES if requested_features is None else requested_features
        return [(None, None) if row is None else (_event_time(row), _features(row, names)) for row in rows]

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """Erase the rows, positions and backfill record of the checkpoints whose views are deleted."""
        rows = self.rows(config)
        kept = {view.tags.get(CHECKPOINT_TAG) for view in tables_to_keep}
        for view in tables_to_delete:
            checkpoint_id = checkpoint_of(view)
            if checkpoint_id not in kept:
                _log.warning("%s: erased %d rows of its checkpoint", view.name, rows.delete_checkpoint(checkpoint_id))

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Erase the whole store."""
        self.rows(config).remove()
        self._rows = None

    def rows(self, config: RepoConfig) -> RowStore:
        """The fenced store itself, for the product's own writers and readers."""
        if self._rows is None:
            self._rows = open_rows(config.online_store.model_dump(), chosen_redis())
        return self._rows


def checkpoint_of(view: FeatureView) -> str:
    """Raises InputError for a view that is not one of `views.declare`."""
    checkpoint_id = view.tags.get(CHECKPOINT_TAG)
    names = {field.name for field in view.features}
    if checkpoint_id is None or names != set(FEATURES):
        raise InputError(
            f"feature view {view.name} (features {sorted(names)}, checkpoint {checkpoint_id}) is none of this store's: "
            "declare it with feature_repo.views.declare, or keep it in another Feast project"
        )
    return checkpoint_id


def _user_id(key: EntityKey) -> str:
    if list(key.join_keys) != ["user_id"] or not key.entity_values[0].HasField("string_val"):
        raise InputError(f"entity key {list(key.join_keys)} is not one user_id (a string)")
    return key.entity_values[0].string_val


def _put(checkpoint_id: str, user_id: str, values: dict[str, Value]) -> RowPut:
    missing = [name for name in FEATURES if name not in values or not values[name].HasField("bytes_val")]
    if missing:
        raise InputError(f"user {user_id!r}: features {missing} are missing; a row is written whole")
    folded, recent = (values[name].bytes_val for name in FEATURES)
    read_header(folded, FOLDED_MAGIC, checkpoint_id)
    stamp = read_header(recent, RECENT_MAGIC, checkpoint_id).stamp
    return RowPut(user_id=user_id, stamp=stamp, recent=recent, folded=folded)


def _event_time(row: RowBytes) -> datetime:
    """Of the newest event; 1970 for a damaged row, whose reader will find the damage by itself."""
    try:
        folded, recent = read_header(row.folded, FOLDED_MAGIC), read_header(row.recent, RECENT_MAGIC)
    except WireError:
        return datetime.fromtimestamp(0, UTC)
    return datetime.fromtimestamp(max(folded.reference_ms, recent.reference_ms) / 1000, UTC)


def _features(row: RowBytes, names: Sequence[str]) -> dict[str, Value]:
    stored = {"folded": row.folded, "recent": row.recent}
    return {name: Value(bytes_val=stored[name]) for name in names}
