"""Whether anything of a user is left: every file of a log, a state folder and training folders, byte by byte.

Parquet is read column by column (its pages are compressed), whatever table or version it belongs to; JSON by its
texts, those within texts too (Delta's statistics); SQLite's files in their bytes, free pages and write-ahead log
included. What is anything else is searched as bytes, unless the id is so short that it would be found by chance.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from models.errors import InputError
from models.forgotten import mentions, spellings, stands_in, word

SHORT_BYTES = 8
# Of long texts Delta's statistics have the beginning alone.
STATISTICS_CHARACTERS = 32
_JSON = (".json", ".crc")
_TEXT = (pa.types.is_string, pa.types.is_large_string, pa.types.is_binary, pa.types.is_large_binary)


@dataclass(frozen=True, kw_only=True, slots=True)
class Found:
    """Something of the user: where, what, and how it goes."""

    where: str
    what: str
    remedy: str


def scan_read_log(folder: Path, user_hash: bytes, remedy: str) -> Iterator[Found]:
    """What the files of a read log hold of a user, whom it knows by a hash, as the predicate of a deletion does."""
    spelled = user_hash.hex().encode()
    for path in sorted(folder.rglob("*")):
        if path.suffix == ".parquet" and "_delta_log" not in path.parts:
            held = _has_reads(path, user_hash)
        else:
            held = path.is_file() and _search(path, [spelled])
        if held:
            yield Found(where=str(path), what="reads of the user, or the hash", remedy=remedy)


def _has_reads(path: Path, user_hash: bytes) -> bool:
    with pq.ParquetFile(path) as file:
        return any(
            pc.any(pc.equal(batch["user_hash"], user_hash)).as_py()
            for batch in file.iter_batches(columns=["user_hash"])
        )


def scan_folder(folder: Path, user_id: str, remedy: str, checkpoint_ids: Sequence[str] = ()) -> Iterator[Found]:
    """What the files of a folder hold of a user; checkpoint_ids: those of the stores that may lie there.

    Raises InputError for a file that cannot be read.
    """
    for path in sorted(folder.rglob("*")):
        if not path.is_file():
            continue
        try:
            what = scan_file(path, user_id, checkpoint_ids)
        except FileNotFoundError:
            continue  # a file that went meanwhile holds nothing
        except (OSError, pa.ArrowException) as error:
            raise InputError(f"{path} cannot be looked through: {error}; mend or remove it") from error
        if what is not None:
            yield Found(where=str(path), what=what, remedy=remedy)


def scan_file(path: Path, user_id: str, checkpoint_ids: Sequence[str] = ()) -> str | None:
    """What a file holds of a user, in words. As scan_folder."""
    if path.suffix == ".parquet":
        return _parquet(path, user_id)
    if path.suffix in _JSON:
        return _json(path, user_id)
    if path.name.endswith((".db", ".db-wal", ".db-shm")):
        return _sqlite(path, user_id, checkpoint_ids)
    if len(user_id.encode()) < SHORT_BYTES:
        return None
    return "the id" if _search(path, [word(spelled) for spelled in spellings(user_id)]) else None


def _parquet(path: Path, user_id: str) -> str | None:
    with pq.ParquetFile(path) as file:
        for batch in file.iter_batches():
            for name, column in zip(batch.schema.names, batch.columns, strict=True):
                if _column_holds(column, user_id):
                    return f"the id in column {name}"
    return None


def _column_holds(column: pa.Array, user_id: str) -> bool:
    if pa.types.is_nested(column.type):
        return any(_value_holds(value, user_id) for value in column.to_pylist())
    if pa.types.is_dictionary(column.type):
        return _column_holds(column.dictionary, user_id)
    if not any(is_text(column.type) for is_text in _TEXT):
        return False
    column = column.cast(pa.large_binary())
    for spelled in spellings(user_id):
        hits = column.filter(pc.fill_null(pc.match_substring(column, spelled), False))
        if any(_bytes_hold(value, user_id) for value in hits.to_pylist()):
            return True
    return False


def _bytes_hold(value: bytes, user_id: str) -> bool:
    """Whether a field's bytes are the id, or an event or text with it."""
    return value == user_id.encode() or mentions(user_id, None, value)


def _json(path: Path, user_id: str) -> str | None:
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        if not any(part in line for part in (*spellings(user_id), _beginning(user_id))):
            continue
        try:
            held = _value_holds(json.loads(line), user_id)
        except (ValueError, RecursionError):
            held = stands_in(user_id, line)
        if held:
            return f"the id in line {number}"
    return None


def _value_holds(value: object, user_id: str) -> bool:
    """Whether a text somewhere in the value has the id, or is the beginning of a long one."""
    if isinstance(value, dict):
        return any(_value_holds(each, user_id) for pair in value.items() for each in pair)
    if isinstance(value, list | tuple):
        return any(_value_holds(each, user_id) for each in value)
    if isinstance(value, bytes):
        return _bytes_hold(value, user_id)
    if not isinstance(value, str):
        return False
    if value[:1] in ("{", "["):
        try:
            return _value_holds(json.loads(value), user_id)
        except (ValueError, RecursionError):
            pass
    long = len(user_id) > STATISTICS_CHARACTERS and value.startswith(user_id[:STATISTICS_CHARACTERS])
    return long or stands_in(user_id, value.encode(errors="surrogatepass"))


def _beginning(user_id: str) -> bytes:
    return user_id[:STATISTICS_CHARACTERS].encode()


def _sqlite(path: Path, user_id: str, checkpoint_ids: Sequence[str]) -> str | None:
    """The store's rows and their index have the checkpoint's id right after the user's, so short ids are found too.

    Of a checkpoint that is not known any more, an id that a digit follows by chance is not.
    """
    ends = [*(each.encode() for each in checkpoint_ids), rb"[0-9a-f]{32}(?![0-9a-f])"]
    begins = [rb"(?<![\w-])" + re.escape(spelled) for spelled in spellings(user_id)]
    patterns = [begin + b"(?=" + end + b")" for begin in begins for end in ends]
    if len(user_id.encode()) >= SHORT_BYTES:
        patterns += [word(spelled) for spelled in spellings(user_id)]
    return "the id in a page, of a row or of one that was erased" if _search(path, patterns) else None


def _search(path: Path, patterns: Sequence[bytes]) -> bool:
    if path.stat().st_size == 0:
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return any(re.search(pattern, data) is not None for pattern in patterns)
