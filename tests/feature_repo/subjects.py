"""The stores under test, how time passes for them, and plain puts: stores do not look into the bytes."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowPut, RowStore
from models.row import RowBytes
from models.wire import Stamp

if TYPE_CHECKING:
    from pytest import FixtureRequest  # noqa: PT013 - the processes of a race import this module, without pytest

A, B = "a" * 32, "b" * 32


@dataclass
class Clock:
    """Seconds that pass when a test says so."""

    now_s: float = 1_700_000_000.0

    def __call__(self) -> float:
        return self.now_s


class Subject(Protocol):
    """A store under test. environment: the variables by which an operator chooses it."""

    environment: dict[str, str]

    def open(self, ttl_s: float | None = None) -> RowStore: ...

    def wait(self, seconds: float) -> None:
        """Let this much time pass for the store."""


@dataclass
class SqliteSubject:
    """How the tests open the embedded store, and how time passes for it."""

    folder: Path
    clock: Clock = field(default_factory=Clock)
    environment: dict[str, str] = field(default_factory=dict)

    def open(self, ttl_s: float | None = None) -> RowStore:
        return SqliteRows(self.folder / "online.db", ttl_s, self.clock)

    def wait(self, seconds: float) -> None:
        self.clock.now_s += seconds


@dataclass
class RedisSubject:
    """How the tests open the store on a server, which keeps its own time."""

    url: str

    @property
    def environment(self) -> dict[str, str]:
        return {"VQL_REDIS_URL": self.url}

    def open(self, ttl_s: float | None = None) -> RowStore:
        return RedisRows(RedisSettings(url=self.url, ttl_s=ttl_s))

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


# Every store that there is: a further one is a further line.
SUBJECTS: dict[str, Callable[[FixtureRequest], Subject]] = {
    "sqlite": lambda request: SqliteSubject(request.getfixturevalue("tmp_path")),
    "redis": lambda request: RedisSubject(request.getfixturevalue("redis_url")),
}


def stamp(offset: int, *, epoch: int = 0, revision: int = 0, partition: int = 0) -> Stamp:
    return Stamp(epoch=epoch, partition=partition, offset=offset, revision=revision)


def whole(user_id: str, at: Stamp, follows: Stamp | None = None) -> RowPut:
    """A whole row whose two parts both say its stamp, over several database pages."""
    mark = repr(at.order).encode() * 400
    return RowPut(user_id=user_id, stamp=at, recent=mark, folded=mark, follows=follows)


def partial(user_id: str, at: Stamp, follows: Stamp) -> RowPut:
    return RowPut(user_id=user_id, stamp=at, recent=b"new", folded=None, follows=follows)


def bytes_of(put: RowPut) -> RowBytes:
    assert put.folded is not None
    return RowBytes(folded=put.folded, recent=put.recent)


def get(store: RowStore, user_id: str, checkpoint_id: str = A) -> RowBytes | None:
    return store.get_rows(checkpoint_id, [user_id])[0]
