"""Feast's own stores behind the product's interface: the negative controls of the race. They have no fence."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext
from datetime import UTC, datetime
from pathlib import Path

from feast import Entity, FeatureView, Field, RepoConfig, ValueType
from feast.infra.online_stores.online_store import OnlineStore
from feast.infra.online_stores.redis import RedisOnlineStore
from feast.infra.online_stores.sqlite import SqliteOnlineStore
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Bytes, String

from feature_repo.store import RowPut
from models.row import RowBytes


class StockStore:
    """One of Feast's own stores, driven as the product's are: the stamp's offset is the event time.

    section: feature_store.yaml's online_store. turn: what a writer holds while it writes.
    """

    def __init__(self, folder: Path, section: dict[str, str], store: OnlineStore, turn: AbstractContextManager) -> None:
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
            registry=str(folder / "registry.db"),
            online_store=section,
            entity_key_serialization_version=3,
        )
        self.turn, self.store = turn, store
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
            None
            if not row or not row["folded"].bytes_val
            else RowBytes(folded=row["folded"].bytes_val, recent=row["recent"].bytes_val)
            for _, row in found
        ]

    def _key(self, user_id: str) -> EntityKey:
        return EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=user_id)])


def stock_sqlite(folder: Path) -> StockStore:
    """Its writers take turns, since it gives up on a locked file; it loses the race all the same."""
    section = {"type": "sqlite", "path": str(folder / "stock.db")}
    return StockStore(folder, section, SqliteOnlineStore(), threading.Lock())


def stock_redis(folder: Path, port: int) -> StockStore:
    """It compares times, and writes what it found newer in a second step."""
    section = {"type": "redis", "connection_string": f"127.0.0.1:{port}"}
    return StockStore(folder, section, RedisOnlineStore(), nullcontext())
