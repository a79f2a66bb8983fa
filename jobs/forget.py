"""Forgetting a user: from the log's tables, from the rows of every checkpoint, and from whatever is ingested later.

In the order that a kill may cut anywhere: the tombstone goes into the log, the request into the list of the forgotten
(from then on nothing brings the user back), rows are emptied, tables erased. What others may still be reading stays
for `retain_s`: old files, commits, and the empty rows that hold back slow writers. So a request takes two runs, the
second one when that time is over; a run looks up the request that there is and does what is left of it.

Knows nothing of Kafka's clients: the topic is handed in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from zlib import crc32

from deltalake import DeltaTable

from feature_repo.forgotten import FORGOTTEN, ForgottenRef, read_forgotten, write_done, write_requests
from feature_repo.redis_store import RedisRows
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowStore
from feature_repo.store_scan import redis_keys_of, rows_of
from jobs.forget_rows import behind, drop_empty_rows, empty_rows, partitions_of_rows
from jobs.forget_scan import Found, scan_file, scan_folder, scan_read_log
from jobs.forget_tables import (
    OTHER_TABLES,
    Target,
    append_tombstone,
    blank_tombstones,
    nobodys_reads,
    partitions_of,
    present,
    purge,
)
from models.errors import InputError
from models.event import ID_BYTES_MAX
from models.forgotten import Request
from models.user_hash import hashed_user, user_hash_key

AGAIN = "run vql forget for this user again"
OF_ANYBODY = "whose users another key hashed"
OLD_READS = "let vql audit --keep-days delete them"


class HeldRecords(Protocol):
    """A user's records in a partition of a topic."""

    @property
    def partition(self) -> int: ...
    @property
    def records(self) -> int: ...
    @property
    def last_offset(self) -> int: ...
    @property
    def last_time_ms(self) -> int: ...


class UsersTopic(Protocol):
    """The topic that the log is the copy of."""

    @property
    def name(self) -> str: ...
    @property
    def epoch(self) -> int: ...
    @property
    def partitions(self) -> int: ...
    def place_tombstone(self, user_id: str, partition: int | None) -> tuple[int, int]: ...
    def settings(self) -> dict[str, str]: ...
    def held(self, user_id: str) -> Sequence[HeldRecords]: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Places:
    """Where users are: the log's folder, the online store, the topic (None: the log was made from files).

    state: the folder of the embedded store and of Feast's registry. key_file: of the keyed hash. read_log: what rankers
    log their reads to. folders: others that hold examples and the like, and topics: others, with dead letters, which
    are looked through.
    """

    log: Path
    state: Path
    rows: RowStore
    key_file: Path | None
    topic: UsersTopic | None = None
    read_log: Path | None = None
    folders: Sequence[Path] = ()
    topics: Sequence[UsersTopic] = ()

    @property
    def ref(self) -> ForgottenRef:
        return ForgottenRef(path=self.log / FORGOTTEN, key_file=self.key_file)


@dataclass(kw_only=True)
class Outcome:
    """What a run did (counts by what they are of), and what remains to be done, in sentences."""

    requests: list[Request]
    counts: dict[str, int] = field(default_factory=dict)
    remains: list[str] = field(default_factory=list)


def forget(places: Places, user_id: str, retain_s: float, again: bool = False, now_ms: int | None = None) -> Outcome:
    """Forget the user up to now, or go on with the request that there is; again: ask anew, for one who came back.

    Raises InputError for no key, no log or no id; StoreError where the log or the store cannot be written.
    """
    _check(places, user_id)
    now_ms = time.time_ns() // 1_000_000 if now_ms is None else now_ms
    known = read_forgotten(places.ref).of(user_id)
    fresh = _request(places, user_id, now_ms) if again or not known else []
    if fresh:
        write_requests(places.ref, user_id, fresh, now_ms)
    requests = [*known, *fresh]
    outcome = Outcome(requests=requests)
    target = Target(user_id=user_id, requests=requests, key=user_hash_key(places.key_file))
    outcome.counts["rows emptied"] = sum(empty_rows(places.rows, user_id, request) for request in requests)
    for path, table in present(places.log, places.read_log):
        outcome.counts[table.name] = table.erase(path, target)
    _finish(places, target, outcome, retain_s, now_ms)
    write_done(places.ref, user_id, requests[-1], outcome.counts, now_ms)
    return outcome


def plan(places: Places, user_id: str) -> Outcome:
    """What `forget` would find, changing nothing: rows behind the request, and files that hold the user."""
    _check(places, user_id)
    known = list(read_forgotten(places.ref).of(user_id))
    outcome = Outcome(requests=known)
    held = rows_of(places.rows, user_id)
    outcome.counts["rows"] = behind(places.rows, user_id, known) if known else len(held)
    for path, table in present(places.log, None):
        outcome.counts[f"files of {table.name}"] = len(list(scan_folder(path, user_id, AGAIN)))
    outcome.counts["files of logged reads"] = len(list(_in_read_log(places, user_id)))
    return outcome


def verify(places: Places, user_id: str) -> Iterator[Found]:
    """Everything that is left of the user anywhere. A user who came back after the request is found as well."""
    _check(places, user_id)
    known = places.rows.checkpoint_ids()
    for checkpoint_id in rows_of(places.rows, user_id):
        yield Found(where=f"the online store, checkpoint {checkpoint_id}", what="a row", remedy=_row_remedy(places))
    if isinstance(places.rows, RedisRows):
        for what in redis_keys_of(places.rows, user_id):
            yield Found(where=f"Redis at {places.rows.settings.url}", what=what, remedy=_row_remedy(places))
    elif isinstance(places.rows, SqliteRows) and not places.rows.path.is_relative_to(places.state):
        for suffix in ("", "-wal", "-shm"):
            path = Path(f"{places.rows.path}{suffix}")
            if path.exists() and (what := scan_file(path, user_id, known)) is not None:
                yield Found(where=str(path), what=what, remedy=AGAIN)
    yield from scan_folder(places.state, user_id, AGAIN, known)
    yield from scan_folder(places.log, user_id, f"{AGAIN}, when what readers may need is no longer retained")
    yield from _in_read_log(places, user_id)
    for folder in places.folders:
        yield from scan_folder(folder, user_id, "delete this folder: a training makes its examples anew from the log")
    for topic in ([] if places.topic is None else [places.topic]) + list(places.topics):
        yield from _topic_holds(topic, user_id)


def _in_read_log(places: Places, user_id: str) -> Iterator[Found]:
    key, read_log = user_hash_key(places.key_file), places.read_log
    if read_log is None:
        return
    yield from scan_read_log(read_log, hashed_user(user_id, key), AGAIN)
    if others := nobodys_reads(read_log, key):
        yield Found(where=str(read_log), what=f"{others:,} reads {OF_ANYBODY}", remedy=OLD_READS)


def _check(places: Places, user_id: str) -> None:
    size_bytes = len(user_id.encode(errors="surrogatepass"))
    if not 1 <= size_bytes <= ID_BYTES_MAX:
        raise InputError(f"a user id has 1 to {ID_BYTES_MAX} bytes, not {size_bytes}")
    if not places.log.is_dir():
        raise InputError(f"there is no log at {places.log}; --log names the folder given to vql stream")
    if places.read_log is not None and not DeltaTable.is_deltatable(str(places.read_log)):
        raise InputError(f"there is no read log at {places.read_log}; --read-log names what vql serve writes")


def _request(places: Places, user_id: str, now_ms: int) -> list[Request]:
    """A tombstone in each partition that has the user, or in the one that would; where they are."""
    events, topic = places.log / "events", places.topic
    table = DeltaTable(events) if DeltaTable.is_deltatable(str(events)) else None
    facts = {} if table is None else table.metadata().configuration
    if topic is None and table is None:
        raise InputError(f"there is no table of events in {places.log}; name the --topic that the stream reads")
    copied, named = facts.get("vql.topic"), None if topic is None else topic.name
    if table is not None and copied != named:
        made_from = "files: give no --topic" if copied is None else f"topic {copied}: give that by --topic"
        raise InputError(f"{events} was made from {made_from}")
    epoch = int(facts["vql.epoch"]) if topic is None else topic.epoch
    in_log = [] if table is None else partitions_of(events, user_id, epoch)
    found = in_log or partitions_of_rows(places.rows, user_id, epoch)
    if topic is not None:
        placed = [topic.place_tombstone(user_id, partition) for partition in found or [None]]
    else:
        chosen = found or [_partition_of(user_id, int(facts["vql.partitions"]))]
        placed = [(partition, append_tombstone(events, user_id, epoch, partition)) for partition in chosen]
    return [Request(epoch, partition, offset, now_ms) for partition, offset in placed]


def _finish(places: Places, target: Target, outcome: Outcome, retain_s: float, now_ms: int) -> None:
    """What others may still need goes when the retained time is over."""
    user_id, events = target.user_id, places.log / "events"
    over_ms = max(request.requested_ms for request in target.requests) + round(retain_s * 1000)
    outcome.counts["rows dropped"] = outcome.counts["tombstones blanked"] = 0
    if now_ms >= over_ms:
        for request in target.requests:
            dropped, waiting = drop_empty_rows(places.rows, user_id, request, streamed=places.topic is not None)
            outcome.counts["rows dropped"] += dropped
            outcome.remains += [
                f"the empty row of checkpoint {checkpoint_id} stays until its stream is past {_words(request)}: "
                f"{AGAIN} then, or erase the checkpoint if it has no stream any more"
                for checkpoint_id in waiting
            ]
        if DeltaTable.is_deltatable(str(events)):
            outcome.counts["tombstones blanked"] = blank_tombstones(events, target)
    else:
        when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(over_ms / 1000))
        outcome.remains.append(
            f"old files of the tables, the tombstone's id and empty rows stay for running readers until {when}: "
            f"{AGAIN} then"
        )
    if places.read_log is not None and (others := nobodys_reads(places.read_log, target.key)):
        outcome.remains.append(f"{others:,} logged reads {OF_ANYBODY}: {OLD_READS}")
    paths = [path for path, _ in present(places.log, places.read_log)]
    paths += [places.log / name for name in OTHER_TABLES if DeltaTable.is_deltatable(str(places.log / name))]
    outcome.counts["old files removed"] = sum(purge(path, retain_s) for path in paths)


def _topic_holds(topic: UsersTopic, user_id: str) -> Iterator[Found]:
    held = topic.held(user_id)
    if not held:
        return
    settings = topic.settings()
    said = ", ".join(f"{name}={value}" for name, value in settings.items())
    for each in held:
        yield Found(
            where=f"topic {topic.name}, partition {each.partition}",
            what=f"{each.records:,} records up to offset {each.last_offset} ({said})",
            remedy=_topic_remedy(settings, each),
        )


def _topic_remedy(settings: dict[str, str], held: HeldRecords) -> str:
    through = f"once every stream and the ingest are past it, delete the partition's records up to {held.last_offset}"
    if "delete" not in settings["cleanup.policy"]:
        through += ", for which cleanup.policy has to have delete"
    if "compact" in settings["cleanup.policy"]:
        return f"compaction removes them after delete.retention.ms when their segment is closed; or {through}"
    retention_ms = int(settings["retention.ms"])
    if retention_ms < 0:
        return f"retention.ms is -1, so they stay for ever: set it, or {through}"
    until_s = (held.last_time_ms + retention_ms) / 1000
    return f"retention deletes them after {time.strftime('%Y-%m-%d %H:%M UTC', time.gmtime(until_s))}; or {through}"


def _row_remedy(places: Places) -> str:
    if places.topic is None:
        return AGAIN
    return f"{AGAIN}, when its stream is past the tombstone"


def _partition_of(user_id: str, partitions: int) -> int:
    """As the ingest places users."""
    return crc32(user_id.encode()) % partitions


def _words(request: Request) -> str:
    return f"{request.epoch}:{request.partition}:{request.offset}"
