"""What an online store holds of a user: by its rows, and by all keys and values of Redis, whoever wrote them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from feature_repo.redis_scripts import GENERATION
from feature_repo.store import RowStore
from models.forgotten import stands_in

KEYS_PER_SCAN = 1_000
_READ = {"string": "GET", "hash": "HGETALL", "list": "LRANGE", "set": "SMEMBERS", "zset": "ZRANGE"}
_ALL = (0, -1)


def rows_of(rows: RowStore, user_id: str) -> list[str]:
    """The checkpoints that have a row of the user."""
    return [each for each in rows.checkpoint_ids() if rows.get_rows(each, [user_id]) != [None]]


def redis_keys_of(rows: Any, user_id: str) -> Iterator[str]:
    """Each key of the server that has the id in its name or its value, in words; rows: feature_repo.redis_store's.

    Reads everything there is, by SCAN; it needs Redis' user vql-admin.
    """
    cursor = b"0"
    while True:
        ((cursor, keys),) = rows.ask([("SCAN", cursor, "COUNT", KEYS_PER_SCAN)])
        yield from _held(rows, keys, user_id)
        if int(cursor) == 0:
            return


def _held(rows: Any, keys: Sequence[bytes], user_id: str) -> Iterator[str]:
    kinds = rows.ask([("TYPE", key) for key in keys]) if keys else []
    reads = [
        (key, kind.decode() if isinstance(kind, bytes) else str(kind)) for key, kind in zip(keys, kinds, strict=True)
    ]
    asked = [(_READ[k], key, *(_ALL if k in ("list", "zset") else ())) for key, k in reads if k in _READ]
    values = iter(rows.ask(asked) if asked else [])
    for key, kind in reads:
        value = next(values) if kind in _READ else b""
        if _name_holds(key, user_id):
            yield f"the key {key!r}"
        elif key != GENERATION and any(_value_holds(each, user_id) for each in _parts(value)):
            yield f"the value of {key!r}"


def _name_holds(key: bytes, user_id: str) -> bool:
    """By its end for a row of ours, whose other parts are numbers that an id may be like; as text for another."""
    if key.startswith(b"vql:{"):
        return key.split(b":", 4)[4:] == [user_id.encode()] and b":row:" in key
    return stands_in(user_id, key)


def _value_holds(value: bytes, user_id: str) -> bool:
    # A short id is in binary numbers by chance.
    return value == user_id.encode() or (len(user_id.encode()) >= 8 and stands_in(user_id, value))


def _parts(value: Any) -> Iterator[bytes]:
    if isinstance(value, bytes):
        yield value
    elif isinstance(value, dict):
        for pair in value.items():
            yield from pair
    else:
        yield from value or ()
