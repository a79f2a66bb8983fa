"""Feast's own SQLite store behind the product's interface: the negative control of the race. It has no fence."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from pathlib import Path

from feast import Entity, FeatureView, Field, RepoConfig, ValueType
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Bytes, String

from feature_repo.store import RowPut
from models.row import RowBytes


class StockStore:
    """Feast's own SQLite store, driven as the product's stores are: the stamp's offset is the event time.

    Its writers take turns, since it gives up on a locked file; it loses the race all the same.
    """

    def __init__(self, path: Path) -> None:
        user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
        schema = [
            Field(name="user_id", dtype=String),
            Field(name="folded", dtype=Bytes),
            Field(name="recent", dtype=Bytes),
        ]
        self.view = FeatureView(name="history", entities=[user], schema=schema)
        self.config = RepoConfig(
            project="stock",
            provider="local",
            registry=str(path.with_name("registry.db")),
            online_store={"type": "sqlite", "path": str(path)},
            entity_key_serialization_version=3,
        )
        self.turn = threading.Lock()
        self.store = SqliteOnlineStore()
        self.store.update(self.config, [], [self.view], [], [user], False)

    def put_rows(self, checkpoint_id: str, puts: list[RowPut]) -> list[bool]:
        data = [
            (
                self._key(put.user_id),
                {"folded": Value(bytes_val=put.folded), "recent": Value(bytes_val=put.recent)},
                datetime.fromtimestamp(put.stamp.offset, UTC),
                None,
            )
            for put in puts
        ]
        with self.turn:
            self.store.online_write_batch(self.config, self.view, data, None)
        return [True] * len(puts)

    def get_rows(self, checkpoint_id: str, user_ids: list[str]) -> list[RowBytes | None]:
        found = self.store.online_read(self.config, self.view, [self._key(user_id) for user_id in user_ids])
        return [
            None if row is None else RowBytes(folded=row["folded"].bytes_val, recent=row["recent"].bytes_val)
            for _, row in found
        ]

    def _key(self, user_id: str) -> EntityKey:
        return EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user_id)])
