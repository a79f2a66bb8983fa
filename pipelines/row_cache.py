"""The rows that a worker keeps in memory, so that a user who comes again costs no read and no decoding.

The store's fence makes this safe: a put must go on from the very row that is stored, so a row here that another
writer, a repair, an erasure or an expiry has overtaken is refused, dropped and read again.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence

from cachetools import LRUCache

from models.row import Row

ROW_CACHE_BYTES = 256 << 20
# What an entry takes beside its bytes: two stamps, the row, the id, and its places in three dictionaries.
_ENTRY_BYTES = 1_000


class RowCache:
    """The rows of one checkpoint as this process read or put them last; beyond `bytes_max` the least recently used go.

    Safe to share between threads.
    """

    def __init__(self, bytes_max: int) -> None:
        self._rows: LRUCache[str, Row] = LRUCache(bytes_max, getsizeof=_size_bytes)
        self._turn = threading.Lock()

    @property
    def size_bytes(self) -> int:
        """What the rows take, nearly."""
        return int(self._rows.currsize)

    def get(self, user_ids: Sequence[str]) -> list[Row | None]:
        """The rows in the order of user_ids; None where the store has to be asked."""
        with self._turn:
            return [self._rows.get(user_id) for user_id in user_ids]

    def keep(self, user_ids: Sequence[str], rows: Sequence[Row]) -> None:
        """Remember these users' rows, which are in the store."""
        with self._turn:
            for user_id, row in zip(user_ids, rows, strict=True):
                try:
                    self._rows[user_id] = row
                except ValueError:  # larger than the whole cache
                    self._rows.pop(user_id, None)

    def drop(self, user_ids: Iterable[str]) -> None:
        """Forget these rows: the store holds others."""
        with self._turn:
            for user_id in user_ids:
                self._rows.pop(user_id, None)


def _size_bytes(row: Row) -> int:
    return row.size_bytes + _ENTRY_BYTES
