"""A user's name where ids must not be: a keyed hash, the same in read logs and records of erasures.

Who has no key can neither find a user in these nor try ids until one fits. A key that is lost or changed makes what was
written under it nobody's.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from hashlib import blake2b
from pathlib import Path

from models.errors import InputError

KEY = "VQL_USER_HASH_KEY"
KEY_FILE = f"{KEY}_FILE"
KEY_BYTES_MIN, KEY_BYTES_MAX = 16, blake2b.MAX_KEY_SIZE
HASH_BYTES = 16


def hashed_user(user_id: str, key: bytes) -> bytes:
    """16 bytes: BLAKE2b of the id's UTF-8, with the key."""
    return blake2b(user_id.encode(), key=key, digest_size=HASH_BYTES).digest()


def key_id(key: bytes) -> str:
    """What tells one key from another, and nothing of either: of what another key hashed, no user is found."""
    return blake2b(key=key, digest_size=4, person=b"vql key id").hexdigest()


def user_hash_key(environment: Mapping[str, str] = os.environ) -> bytes:
    """The key that VQL_USER_HASH_KEY is, or that the file holds which VQL_USER_HASH_KEY_FILE names.

    Raises InputError where there is none, one of less than 16 or more than 64 bytes, or a file that cannot be read.
    """
    if path := environment.get(KEY_FILE):
        try:
            # An editor ends a file with a line's end; it is not of the key.
            key = Path(path).read_bytes().rstrip(b"\r\n")
        except OSError as error:
            raise InputError(f"{KEY_FILE} names {path}, which cannot be read ({error.strerror})") from error
    else:
        key = os.fsencode(environment.get(KEY, ""))
    if not key:
        raise InputError(f"there is no key to hash user ids with: set {KEY_FILE} to the path of a file that holds one")
    if not KEY_BYTES_MIN <= len(key) <= KEY_BYTES_MAX:
        # Not shown: it is a secret all the same.
        raise InputError(
            f"the key to hash user ids with has {len(key)} bytes; it must have 16 to 64: make it of random"
        )
    return key
