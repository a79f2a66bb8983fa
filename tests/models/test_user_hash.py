"""A user's keyed hash, and where its key comes from."""

from __future__ import annotations

from pathlib import Path

import pytest

from models.errors import InputError
from models.user_hash import HASH_BYTES, chosen_key_file, hashed_user, key_id, user_hash_key

KEY = b"sixteen or more bytes"


def test_the_hash_is_of_both_the_user_and_the_key() -> None:
    mine = hashed_user("u1", KEY)
    assert len(mine) == HASH_BYTES
    # Written down: read logs and records of years ago are to be found by it.
    assert mine.hex() == "6df8063929c433af326d4541a37b6f17"
    assert len({mine, hashed_user("u2", KEY), hashed_user("u1", KEY + b"."), hashed_user("ü1", KEY)}) == 4


def test_a_key_of_a_record_that_is_no_text_has_a_hash_too() -> None:
    assert hashed_user(b"\xff".decode(errors="surrogateescape"), KEY) != hashed_user("\ufffd", KEY)


def test_keys_are_told_apart_without_being_shown() -> None:
    assert key_id(KEY) == key_id(bytes(KEY)) != key_id(KEY[::-1])
    assert len(key_id(KEY)) == 8


def test_the_key_is_that_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "key"
    file.write_bytes(b"\x00" * 32 + b"\n")
    assert chosen_key_file({"VQL_USER_HASH_KEY_FILE": str(file)}) == file
    assert chosen_key_file({"VQL_USER_HASH_KEY_FILE": ""}) is None
    assert user_hash_key(file) == b"\x00" * 32


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "key, which cannot be read"),
        (b"", "has 0 bytes"),
        (b"secret", "has 6 bytes"),
        (b"secret" * 11, "has 66 bytes"),
    ],
)
def test_a_key_that_cannot_be_used_is_refused_and_not_shown(tmp_path: Path, content: bytes | None, words: str) -> None:
    if content is not None:
        (tmp_path / "key").write_bytes(content)
    with pytest.raises(InputError, match=words) as refused:
        user_hash_key(tmp_path / "key")
    assert "secret" not in str(refused.value)


def test_no_key_at_all_is_refused() -> None:
    with pytest.raises(InputError, match="VQL_USER_HASH_KEY_FILE is not set"):
        user_hash_key(None)
