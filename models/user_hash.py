"""A user's name where ids must not be: a keyed hash, the same in read logs and in the list of the forgotten.

Who has no key can neither find a user in these nor try ids until one fits. A key that is lost or changed makes what was
written under it nobody's. The key is in a file, so that jobs carry its path to their workers, and not the key.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from hashlib import blake2b
from pathlib import Path

from models.errors import InputError

KEY_FILE = "VQL_USER_HASH_KEY_FILE"
KEY_BYTES_MIN, KEY_BYTES_MAX = 16, blake2b.MAX_KEY_SIZE
HASH_BYTES = 16


def hashed_user(user_id: str, key: bytes) -> bytes:
    """16 bytes: BLAKE2b of the id's UTF-8, with the key."""
    return blake2b(user_id.encode(errors="surrogatepass"), key=key, digest_size=HASH_BYTES).digest()


def key_id(key: bytes) -> str:
    """What tells one key from another, and nothing of either: of what another key hashed, no user is found."""
    return blake2b(key=key, digest_size=4, person=b"vql key id").hexdigest()


def chosen_key_file(environment: Mapping[str, str] = os.environ) -> Path | None:
    """The file that VQL_USER_HASH_KEY_FILE names."""
    named = environment.get(KEY_FILE)
    return Path(named).absolute() if named else None


@lru_cache(maxsize=4)
def user_hash_key(file: Path | None) -> bytes:
    """The key that a file holds, read once per process.

    Raises InputError where no file is named, it cannot be read, or holds less than 16 or more than 64 bytes.
    """
    if file is None:
        raise InputError(
            f"{KEY_FILE} is not set: users are known by a keyed hash here; name the file with the key "
            f"({KEY_BYTES_MIN} to {KEY_BYTES_MAX} random bytes)"
        )
    try:
        # An editor ends a file with a line's end; it is not of the key.
        key = file.read_bytes().rstrip(b"\r\n")
    except OSError as error:
        raise InputError(f"{KEY_FILE} names {file}, which cannot be read ({error.strerror})") from error
    if not KEY_BYTES_MIN <= len(key) <= KEY_BYTES_MAX:
        # Not shown: it is a secret all the same.
        raise InputError(
            f"the key in {file} ({KEY_FILE}) has {len(key)} bytes; it must have {KEY_BYTES_MIN} to {KEY_BYTES_MAX}, "
            "of random"
        )
    return key
