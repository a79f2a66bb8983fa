"""Stores that fail as planned, over a real one. In a module of its own, because Beam's workers import it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feature_repo.handle import StoreHandle
from feature_repo.store import RowPut, RowStore
from models.errors import StoreError


class FailingPuts:
    """A store whose put_rows fails after so many calls."""

    def __init__(self, rows: RowStore, calls: int) -> None:
        self._rows = rows
        self._calls = calls

    def __getattr__(self, name: str):
        return getattr(self._rows, name)

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        if self._calls == 0:
            raise StoreError("the planted failure")
        self._calls -= 1
        return self._rows.put_rows(checkpoint_id, puts)


@dataclass(frozen=True, kw_only=True, slots=True)
class FailingHandle:
    """A StoreHandle for FailingPuts."""

    real: StoreHandle
    calls: int

    def open(self) -> RowStore:
        return FailingPuts(self.real.open(), self.calls)
