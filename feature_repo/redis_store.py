"""`RedisRows`: the online store of many machines, on Redis 6.2 or newer (or Valkey). Knows no Feast.

A row is one hash with the fields s (stamp), r (recent) and f (folded); its key has the user's shard as hash tag, so
that one script call writes all rows of a shard, and a cluster can spread the shards. Beside each shard's rows is the
index of its users, kept by the same script: `count_rows` is exact, and nothing ever scans the key space.

What a loss leaves. Redis may lose its last writes in a crash or failover, or all of them. Rows, positions and the
backfill record go back together, to one moment; what must not happen is that a running writer goes on from its own
later one. So each writer keeps a tally of its puts in the store, which every read and commit compares with what was
acknowledged: a store that went back is a StoreError, and the writer's restart resumes at the store's own positions.
A store that was emptied is known by its generation, a name it gets when it is first written to: it is a StoreError
too, for readers as well, and never taken for a store of new users. Eviction would forget users one by one, so a
server that evicts is refused.

An expired row (ttl_s after its last write) is absent for everyone, the fence included: its writer starts anew.
"""

from __future__ import annotations

import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from zlib import crc32

import msgspec

from feature_repo.redis_answers import PairAnswers, packed
from feature_repo.redis_link import RedisLink, run_script
from feature_repo.redis_scripts import (
    CHECKPOINTS,
    COMMIT_POSITIONS,
    DELETE_ROW,
    DELETE_SOME,
    GENERATION,
    PUT_ROWS,
    RECORD_BACKFILL,
    SCRIPTS,
    TALLY,
    Script,
)
from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_state import server_state
from feature_repo.store import Backfill, Progress, RowPut, TakeRows, run_out
from models.errors import InputError, StoreError
from models.row import RowBytes
from models.wire import Stamp

SHARDS = 64
USERS_PER_READ = 1000
ROWS_PER_PUT, BYTES_PER_PUT = 2000, 8 << 20
USERS_PER_DELETE = 200
TALLY_KEPT_S = 30 * 86_400


_log = logging.getLogger(__name__)


class RedisRows:
    """`feature_repo.store.RowStore` on one Redis server. Picklable: the copy connects anew.

    Raises UnavailableError while the server does not answer; StoreError (server and remedy) where it refuses, evicts,
    or was emptied or set back while in use; InputError for a user id that is not Unicode text.
    """

    def __init__(self, settings: RedisSettings) -> None:
        self.settings = settings
        self._ttl_ms = 0 if settings.ttl_s is None else max(1, int(settings.ttl_s * 1000))
        self._opened: _Opened | None = None
        self._opening = threading.Lock()

    def __reduce__(self):
        return RedisRows, (self.settings,)

    def get_rows(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[RowBytes | None]:
        rows: list[RowBytes | None] = []

        def take(first: int, part: Sequence[RowBytes | None]) -> None:
            # A try that failed begins again, with what it had given already.
            rows[first:] = part

        run_out(self.reading(checkpoint_id, user_ids, take))
        return rows

    def get_stamps(self, checkpoint_id: str, user_ids: Sequence[str]) -> list[Stamp | None]:
        stored = self._open().ask([("HGET", key, b"s") for key in row_keys(checkpoint_id, user_ids)])
        return [None if packed is None else unpacked_stamp(packed) for packed in stored]

    def reading(
        self, checkpoint_id: str, user_ids: Sequence[str], take: TakeRows, until_s: float | None = None
    ) -> Generator[None, None, None]:
        opened = self._open()
        for start in range(0, len(user_ids), USERS_PER_READ):
            users = user_ids[start : start + USERS_PER_READ]

            def taken(first: int, last: int, answers: PairAnswers, start: int = start, count: int = len(users)) -> None:
                # The last answer of all is not a row but the store's name.
                if first < count:
                    take(start + first, answers.rows(first, min(last, count)))

            def commands(first: int, last: int, users: Sequence[str] = users) -> list[bytes]:
                return _row_commands(checkpoint_id, users[first:last])

            yield from opened.reading(len(users), commands, taken, until_s)

    def put_rows(self, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        if not puts:
            return []
        opened = self._open_to_write()
        return [done for chunk in _chunks(puts) for done in self._put(opened, checkpoint_id, chunk)]

    def _put(self, opened: _Opened, checkpoint_id: str, puts: Sequence[RowPut]) -> list[bool]:
        calls = _calls_by_shard(checkpoint_id, puts, self._ttl_ms)
        commands = [run_script(PUT_ROWS, keys, arguments) for keys, arguments, _ in calls]
        done = [False] * len(puts)
        for (_, _, places), answer in zip(calls, opened.put(checkpoint_id, commands), strict=True):
            for place, accepted in zip(places, answer, strict=True):
                done[place] = accepted == ord("1")
        return done

    def count_rows(self, checkpoint_id: str) -> int:
        opened = self._open()
        ((seconds, micros),) = opened.ask([("TIME",)])
        now_ms = seconds * 1000 + micros // 1000
        return sum(opened.ask([("ZCOUNT", index, now_ms, "+inf") for index, _ in _shards(checkpoint_id)]))

    def delete_user(self, user_id: str) -> int:
        user, opened = _encoded(user_id), self._open()
        (checkpoint_ids,) = opened.ask([("SMEMBERS", CHECKPOINTS)])
        places = [_shards(checkpoint_id.decode())[crc32(user) % SHARDS] for checkpoint_id in checkpoint_ids]
        return sum(opened.ask([run_script(DELETE_ROW, [index, prefix + user], [user]) for index, prefix in places]))

    def delete_row(self, checkpoint_id: str, user_id: str, stamp: Stamp) -> bool:
        user = _encoded(user_id)
        index, prefix = _shards(checkpoint_id)[crc32(user) % SHARDS]
        (deleted,) = self._open().ask([run_script(DELETE_ROW, [index, prefix + user], [user, packed_stamp(stamp)])])
        return deleted > 0

    def delete_checkpoint(self, checkpoint_id: str) -> int:
        opened, rows = self._open(), 0
        opened.ask([("DEL", _backfill_key(checkpoint_id), _positions_key(checkpoint_id), _logs_key(checkpoint_id))])
        for index, prefix in _shards(checkpoint_id):
            users = 1
            while users:
                started_s = time.monotonic()
                ((users, deleted),) = opened.ask([run_script(DELETE_SOME, [index], [prefix, USERS_PER_DELETE])])
                rows += deleted
                # Half of the server's time stays with the others.
                time.sleep(time.monotonic() - started_s if users else 0)
        opened.ask([("SREM", CHECKPOINTS, checkpoint_id)])
        return rows

    def bind_log(self, checkpoint_id: str, epoch: int, log: str) -> str:
        key = _logs_key(checkpoint_id)
        _, _, named = self._open_to_write().ask(
            [("SADD", CHECKPOINTS, checkpoint_id), ("HSETNX", key, epoch, log), ("HGET", key, epoch)]
        )
        return named.decode()

    def progress(self, checkpoint_id: str) -> Progress:
        commands = [("HGETALL", _positions_key(checkpoint_id)), ("GET", _backfill_key(checkpoint_id))]
        positions, record = self._open().ask(commands)
        return Progress(positions=_positions(positions), backfill=_backfill(record))

    def checkpoint_ids(self) -> list[str]:
        (checkpoint_ids,) = self._open().ask([("SMEMBERS", CHECKPOINTS)])
        return sorted(checkpoint_id.decode() for checkpoint_id in checkpoint_ids)

    def ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The server's answers to commands that change nothing; see `condition`."""
        return self._open().ask(commands)

    # The next two are what a writer asks first: from then on it must notice a loss.
    def positions(self, checkpoint_id: str) -> dict[int, tuple[int, int]]:
        (stored,) = self._open_to_write().ask([("HGETALL", _positions_key(checkpoint_id))])
        return _positions(stored)

    def backfill(self, checkpoint_id: str) -> Backfill | None:
        (record,) = self._open_to_write().ask([("GET", _backfill_key(checkpoint_id))])
        return _backfill(record)

    def commit_positions(self, checkpoint_id: str, epoch: int, offsets: Mapping[int, int]) -> None:
        arguments = [epoch, *(number for pair in offsets.items() for number in pair)]
        self._open_to_write().record(COMMIT_POSITIONS, _positions_key(checkpoint_id), arguments)

    def record_backfill(self, checkpoint_id: str, backfill: Backfill) -> None:
        self._open_to_write().record(RECORD_BACKFILL, _backfill_key(checkpoint_id), [msgspec.json.encode(backfill)])

    def close(self) -> None:
        with self._opening:
            opened, self._opened = self._opened, None
        if opened is not None:
            opened.link.close()

    def remove(self) -> None:
        opened = self._open()
        (checkpoint_ids,) = opened.ask([("SMEMBERS", CHECKPOINTS)])
        for checkpoint_id in checkpoint_ids:
            self.delete_checkpoint(checkpoint_id.decode())
        opened.link.run([("DEL", CHECKPOINTS, GENERATION)])
        self.close()

    def _open(self) -> _Opened:
        with self._opening:
            if self._opened is None or self._opened.pid != os.getpid():
                self._opened = _Opened(RedisLink(self.settings))
            return self._opened

    def _open_to_write(self) -> _Opened:
        opened = self._open()
        opened.begin_to_write()
        return opened


class _Known(NamedTuple):
    """What a process knows of the store before it asks."""

    generation: bytes | None
    tally: bytes | None
    puts: int

    @property
    def command(self) -> tuple[bytes, ...]:
        """What asks for the same."""
        return b"MGET", GENERATION, self.tally or GENERATION


class _Opened:
    """One process's dealings with the store, from its first call to `close`: it notices when the store is lost."""

    def __init__(self, link: RedisLink) -> None:
        self.link = link
        self.pid = os.getpid()
        self._generation: bytes | None = None
        self._tally: bytes | None = None
        self._puts = 0  # acknowledged
        self._writing = threading.Lock()

    def ask(self, commands: Sequence[tuple[Any, ...]]) -> list[Any]:
        """The answers, which all come from the store that was opened and not from an earlier state of it."""
        known = self._known()
        *answers, named = self.link.run([*commands, known.command])
        self._compare(known, named)
        return answers

    def reading(
        self,
        count: int,
        commands: Callable[[int, int], list[bytes]],
        take: Callable[[int, int, PairAnswers], None],
        until_s: float | None,
    ) -> Generator[None, None, None]:
        """`ask`, as `RedisLink.fetch` does it; `take` gets the store's name as the last answer."""
        known = self._known()

        def and_its_name(first: int, last: int) -> list[bytes]:
            return commands(first, last) + ([packed(known.command)] if last > count else [])

        answers = yield from self.link.fetch(count + 1, and_its_name, take, until_s)
        self._compare(known, answers.pair(count))

    def _known(self) -> _Known:
        # Its command is answered behind the rows, and compared with what was known before them: other threads go on.
        return _Known(self._generation, self._tally, self._puts)

    def _compare(self, before: _Known, named: Sequence[bytes | None]) -> None:
        (known, tally, puts), (generation, stored) = before, named
        if known is None:
            self._generation = self._generation or generation
        elif generation != known:
            raise StoreError(
                f"online store {self.link.name} was emptied or replaced while in use; run vql backfill, then start "
                "this program again"
            )
        if tally is not None and int(stored or -1) < puts:
            raise StoreError(
                f"online store {self.link.name} went back to an earlier state (a restart or failover lost its last "
                "writes); start this program again: it goes on from what the store holds"
            )

    def begin_to_write(self) -> None:
        """Name the store if it is new, and begin a tally in it."""
        if self._tally is not None:
            return
        with self._writing:
            if self._tally is not None:
                return
            self._look_at_the_server()
            self.link.run([("SCRIPT LOAD", script.text) for script in SCRIPTS])
            tally = b"vql:{meta}:tally:" + uuid.uuid4().hex.encode()
            if self._generation is None:
                self.link.run([("SET", GENERATION, uuid.uuid4().hex, "NX")])
            self.ask([("SET", tally, self._puts, "EX", TALLY_KEPT_S)])
            self._tally = tally

    def _look_at_the_server(self) -> None:
        """Refuse one that would forget users, and say what else is wrong with it."""
        for fault in server_state(self.link.run).faults():
            said = f"online store {self.link.name}: {fault.what}; {fault.remedy}"
            if fault.refused:
                raise StoreError(said)
            _log.warning("%s", said)

    def put(self, checkpoint_id: str, commands: list[tuple[Any, ...]]) -> list[bytes]:
        """The answers to these puts, which count as one in the tally; they take turns, or it would be ambiguous."""
        with self._writing:
            counted = run_script(TALLY, [GENERATION, self._tally], [self._generation, self._puts, TALLY_KEPT_S])
            _, *answers, held = self.link.run([("SADD", CHECKPOINTS, checkpoint_id), *commands, counted])
            self._require(held)
            self._puts += 1
        return answers

    def record(self, script: Script, key: bytes, arguments: Sequence[bytes | int]) -> None:
        """Write what claims that rows are in the store, unless some that were are lost."""
        with self._writing:
            keys = [GENERATION, self._tally, key]
            (held,) = self.link.run([run_script(script, keys, [self._generation, self._puts, *arguments])])
            self._require(held)

    def _require(self, held: int) -> None:
        if not held:
            self.ask([])
            raise StoreError(f"online store {self.link.name} does not know this writer any more; start it again")


def packed_stamp(stamp: Stamp) -> bytes:
    """The stamp as digits of fixed width, which compare as text in the stamps' order; the partition is the tail."""
    return b"%010d%019d%010d%010d" % (stamp.epoch, stamp.offset + 1, stamp.revision, stamp.partition)


def unpacked_stamp(packed: bytes) -> Stamp:
    """The inverse.

    >>> unpacked_stamp(packed_stamp(Stamp(epoch=1, partition=3, offset=-1, revision=2)))
    Stamp(epoch=1, partition=3, offset=-1, revision=2)
    """
    epoch, offset, revision, partition = (int(packed[a:b]) for a, b in ((0, 10), (10, 29), (29, 39), (39, 49)))
    return Stamp(epoch=epoch, partition=partition, offset=offset - 1, revision=revision)


def row_key(checkpoint_id: str, user_id: str) -> bytes:
    """Where a user's row is: a hash with the fields s (stamp), r and f."""
    return row_keys(checkpoint_id, [user_id])[0]


def row_keys(checkpoint_id: str, user_ids: Sequence[str]) -> list[bytes]:
    """The keys of several users' rows."""
    shards = _shards(checkpoint_id)
    return [shards[crc32(user) % SHARDS][1] + user for user in map(_encoded, user_ids)]


def _row_commands(checkpoint_id: str, user_ids: Sequence[str]) -> list[bytes]:
    """What asks for each user's row, as `packed` has it. The hot path: plain and flat."""
    keys = row_keys(checkpoint_id, user_ids)
    return [b"*4\r\n$5\r\nHMGET\r\n$%d\r\n%b\r\n$1\r\nf\r\n$1\r\nr\r\n" % (len(key), key) for key in keys]


@lru_cache(maxsize=16)
def _shards(checkpoint_id: str) -> list[tuple[bytes, bytes]]:
    """Each shard's index of users, and the prefix of its rows' keys."""
    names = [f"vql:{{{shard}}}:" for shard in range(SHARDS)]
    return [(f"{n}users:{checkpoint_id}".encode(), f"{n}row:{checkpoint_id}:".encode()) for n in names]


def _positions_key(checkpoint_id: str) -> bytes:
    return f"vql:{{meta}}:positions:{checkpoint_id}".encode()


def _logs_key(checkpoint_id: str) -> bytes:
    return f"vql:{{meta}}:logs:{checkpoint_id}".encode()


def _backfill_key(checkpoint_id: str) -> bytes:
    return f"vql:{{meta}}:backfill:{checkpoint_id}".encode()


def _positions(stored: Mapping[bytes, bytes]) -> dict[int, tuple[int, int]]:
    return {int(p): (int(epoch), int(offset)) for p, (epoch, offset) in ((p, v.split()) for p, v in stored.items())}


def _backfill(record: bytes | None) -> Backfill | None:
    return None if record is None else msgspec.json.decode(record, type=Backfill)


def _encoded(user_id: str) -> bytes:
    try:
        return user_id.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"user id {user_id!r} is not Unicode text ({error.reason}); no event can carry it") from error


def _chunks(puts: Sequence[RowPut]) -> Iterator[Sequence[RowPut]]:
    """Parts that fit a round trip: a user's puts stay in order."""
    start = size_bytes = 0
    for n, put in enumerate(puts):
        size_bytes += len(put.recent) + len(put.folded or b"")
        if n + 1 - start == ROWS_PER_PUT or size_bytes >= BYTES_PER_PUT:
            yield puts[start : n + 1]
            start, size_bytes = n + 1, 0
    if start < len(puts):
        yield puts[start:]


def _calls_by_shard(
    checkpoint_id: str, puts: Sequence[RowPut], ttl_ms: int
) -> list[tuple[list[bytes], list[bytes | int], list[int]]]:
    """The keys and arguments of PUT_ROWS for each shard, and which puts they are. The hot path: plain and flat."""
    shards = _shards(checkpoint_id)
    calls: dict[int, tuple[list[bytes], list[bytes | int], list[int]]] = {}
    for place, put in enumerate(puts):
        user = _encoded(put.user_id)
        shard = crc32(user) % SHARDS
        index, prefix = shards[shard]
        call = calls.get(shard)
        if call is None:
            call = calls[shard] = ([index], [ttl_ms, len(prefix)], [])
        keys, arguments, places = call
        keys.append(prefix + user)
        places.append(place)
        follows = put.follows
        if follows is None:
            arguments += (b"any", packed_stamp(put.stamp), b"", put.recent, put.folded)
        elif put.folded is None:
            arguments += (b"part", packed_stamp(put.stamp), packed_stamp(follows), put.recent)
        else:
            how = b"first" if follows.offset < 0 else b"next"
            arguments += (how, packed_stamp(put.stamp), packed_stamp(follows), put.recent, put.folded)
    return list(calls.values())
