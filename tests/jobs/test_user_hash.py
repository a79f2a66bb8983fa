"""A user's keyed hash, and where its key comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.user_hash import HASH_BYTES, hashed_user, key_id, user_hash_key
from models.errors import InputError

KEY = b"sixteen or more bytes"


def test_the_hash_is_of_both_the_user_and_the_key() -> None:
    mine = hashed_user("u1", KEY)
    assert len(mine) == HASH_BYTES
    # Written down: read logs and records of years ago are to be found by it.
    assert mine.hex() == "6df8063929c433af326d4541a37b6f17"
    assert len({mine, hashed_user("u2", KEY), hashed_user("u1", KEY + b"."), hashed_user("ü1", KEY)}) == 4


def test_keys_are_told_apart_without_being_shown() -> None:
    assert key_id(KEY) == key_id(bytes(KEY)) != key_id(KEY[::-1])
    assert len(key_id(KEY)) == 8


def test_the_key_is_the_variable_or_the_files(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"\x00" * 32 + b"\n")
    assert user_hash_key({"VQL_USER_HASH_KEY": KEY.decode()}) == KEY
    assert user_hash_key({"VQL_USER_HASH_KEY": "not looked at", "VQL_USER_HASH_KEY_FILE": str(file)}) == b"\x00" * 32


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({}, "set VQL_USER_HASH_KEY_FILE"),
        ({"VQL_USER_HASH_KEY": "secret"}, "has 6 bytes"),
        ({"VQL_USER_HASH_KEY": "secret" * 11}, "has 66 bytes"),
        ({"VQL_USER_HASH_KEY_FILE": "/nowhere/key"}, "/nowhere/key, which cannot be read"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_and_not_shown(environment: dict[str, str], words: str) -> None:
    with pytest.raises(InputError, match=words) as refused:
        user_hash_key(environment)
    assert "secret" not in str(refused.value)
