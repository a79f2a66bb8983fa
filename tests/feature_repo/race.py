"""One race for every store: writers that put rows of the same few users, 100,000 puts in all, and look after each step.

A module of its own, which the processes of a race import: without pytest, and without Feast.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import msgspec

from feature_repo.store import RowPut
from models.row import RowBytes
from tests.feature_repo.subjects import A, stamp

PUTS = 100_000
PUTS_PER_STEP = 50
# A writer's offsets rise by one a put and jump about within so many: most steps have older rows and newer ones.
JITTER = 60
USERS = [f"u{n}" for n in range(5)]
# Each part of a row is its offset over and over, and larger than a page of a database.
DIGITS, REPEATS = 6, 700


class Outcome(msgspec.Struct, frozen=True, kw_only=True):
    """What a writer saw.

    accepted: (user, offset) of each put that was done. overwritten: how often a row was older than one that the writer
    had offered or read before: at that moment an older row had replaced a newer one. torn: rows of two puts.
    """

    accepted: list[tuple[str, int]]
    overwritten: int
    torn: int


def offers(writer: int, writers: int, puts: int = PUTS) -> Iterator[list[RowPut]]:
    """The steps of a writer, its share of this many puts."""
    draw = random.Random(writer)
    for start in range(0, puts // writers, PUTS_PER_STEP):
        places = range(start, min(start + PUTS_PER_STEP, puts // writers))
        yield [_put(draw.choice(USERS), place + draw.randrange(JITTER)) for place in places]


def run(store: Any, writer: int, writers: int, puts: int = PUTS) -> Outcome:
    """Put every step, and read the users after each. store: of the RowStore's verbs, only put_rows and get_rows."""
    newest: Counter[str] = Counter()
    accepted, overwritten, torn = [], 0, 0
    for step in offers(writer, writers, puts):
        done = store.put_rows(A, step)
        accepted += [(put.user_id, put.stamp.offset) for put, was in zip(step, done, strict=True) if was]
        for put in step:
            newest[put.user_id] = max(newest[put.user_id], put.stamp.offset)
        for user_id, row in zip(USERS, store.get_rows(A, USERS), strict=True):
            if row is None:
                overwritten += user_id in newest
                continue
            torn += row.folded != row.recent
            overwritten += offset_of(row) < newest[user_id]
            newest[user_id] = max(newest[user_id], offset_of(row))
    return Outcome(accepted=accepted, overwritten=overwritten, torn=torn)


def newest_offsets(writers: int, puts: int = PUTS) -> list[int]:
    """Of each user, over all offers."""
    newest: Counter[str] = Counter()
    for writer in range(writers):
        for put in (put for step in offers(writer, writers, puts) for put in step):
            newest[put.user_id] = max(newest[put.user_id], put.stamp.offset)
    return [newest[user_id] for user_id in USERS]


def offset_of(row: RowBytes) -> int:
    return int(row.recent[:DIGITS])


def _put(user_id: str, offset: int) -> RowPut:
    mark = b"%0*d" % (DIGITS, offset) * REPEATS
    return RowPut(user_id=user_id, stamp=stamp(offset), recent=mark, folded=mark)
