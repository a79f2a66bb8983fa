"""Bad records are kept, not dropped: a Delta table with the reason, the position and the original bytes of each.

A letter is known by its position (epoch, partition, offset), which says everything about it: a record is bad or
good whatever the checkpoint. `write_dead_letters` merges on the position, so a replay, a second stream over the
same log, or two at once leave each letter once (Delta's conflict check makes the loser read again). Rejected: an
application transaction with the last offset as version; a stream that later starts at an earlier position would
take its letters for written and lose them.

The stream writes the letters in the bundle that handed them out, hence before their offsets are committed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import apache_beam as beam
import pyarrow as pa
from apache_beam.metrics import Metrics
from deltalake import DeltaTable
from deltalake.exceptions import CommitFailedError, DeltaError, TableNotFoundError

from models.errors import StoreError

SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("value", pa.binary()),
    ]
)
TRIES = 20
# A stream of nothing but bad records must not fill the memory of its bundle.
LETTERS_PER_WRITE = 50_000
_SAME_POSITION = "old.partition = new.partition AND old.epoch = new.epoch AND old.offset = new.offset"


@dataclass(frozen=True, kw_only=True, slots=True)
class DeadLetter:
    """A record that is no event: where it was, the reason code, a sentence for people, the original bytes."""

    epoch: int
    partition: int
    offset: int
    reason: str
    detail: str
    value: bytes

    @property
    def position(self) -> tuple[int, int, int]:
        return (self.epoch, self.partition, self.offset)


def write_dead_letters(path: Path, letters: Sequence[DeadLetter]) -> int:
    """Keep the letters that are not there yet; how many were new. Raises StoreError when it cannot."""
    if not letters:
        return 0
    unique = {letter.position: letter for letter in letters}
    rows = pa.Table.from_pylist([asdict(letter) for letter in unique.values()], SCHEMA)
    for _ in range(TRIES):
        try:
            merged = (
                _table(path)
                .merge(rows, _SAME_POSITION, source_alias="new", target_alias="old")
                .when_not_matched_insert_all()
                .execute()
            )
            return merged["num_target_rows_inserted"]
        except CommitFailedError:
            continue
        except (DeltaError, OSError) as error:
            raise StoreError(f"dead letters cannot be written to {path}: {error}") from error
    raise StoreError(f"dead letters cannot be written to {path}: other writers came first {TRIES} times")


def read_dead_letters(path: Path) -> list[DeadLetter]:
    """All letters by position; none when nothing bad was ever met."""
    try:
        rows = DeltaTable(path).to_pyarrow_table(columns=SCHEMA.names)
    except TableNotFoundError:
        return []
    return sorted((DeadLetter(**row) for row in rows.to_pylist()), key=lambda letter: letter.position)


class KeepDeadLetters(beam.DoFn):
    """`write_dead_letters`, once a bundle."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._new = Metrics.counter("vql", "dead_letters")

    def start_bundle(self) -> None:
        self._letters: list[DeadLetter] = []

    def process(self, letters: list[DeadLetter]) -> None:
        self._letters += letters
        if len(self._letters) >= LETTERS_PER_WRITE:
            self.finish_bundle()

    def finish_bundle(self) -> None:
        self._new.inc(write_dead_letters(self._path, self._letters))
        self._letters = []


def _table(path: Path) -> DeltaTable:
    try:
        return DeltaTable(path)
    except TableNotFoundError:
        return DeltaTable.create(path, SCHEMA, mode="ignore", partition_by=["partition"])
