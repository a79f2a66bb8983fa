"""Dead letters produced again: the original bytes and key, to the partition of their topic that they came from.

An event that is produced twice counts twice, so every letter is claimed in a table beside the letters before it is
produced, and the position it got is noted afterwards. Of two replays at once one gets the claim. A claim without a
position is a replay that was cut off: the letter may or may not be on the topic, and only a person can tell, by the
header REPLAY_OF of the topic's records.

The partition is the original's, because another producer's partitioner may place a key elsewhere, and a user's
events must stay in one partition.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from confluent_kafka import KafkaError, Message

from models.errors import StoreError
from models.event import FUTURE_MS_MAX, Records, parse_batch
from models.forgotten import ERASED, NOBODY_FORGOTTEN, Forgotten
from pipelines.dead_letter_topic import DELIVERY_WAIT_S, open_producer
from pipelines.dead_letters import (
    DeadLetter,
    Position,
    Selection,
    merge,
    read_dead_letters,
    read_rows,
    words,
)
from pipelines.kafka_topic import Topic

REPLAY_OF = "vql-replay-of"
SCHEMA = pa.schema(
    [
        ("epoch", pa.int32()),
        ("partition", pa.int32()),
        ("offset", pa.int64()),
        ("claim", pa.string()),
        ("claimed_ms", pa.int64()),
        ("topic", pa.string()),
        ("new_offset", pa.int64()),
    ]
)
LETTERS_PER_TURN, BYTES_PER_TURN = 5_000, 64 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class Replay:
    """A letter's last replay: its claim and when (wall clock), the topic, the offset it got there; None: cut off."""

    claim: str
    claimed_ms: int
    topic: str
    new_offset: int | None

    @property
    def words(self) -> str:
        return "begun, and not confirmed" if self.new_offset is None else f"at offset {self.new_offset}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Rules:
    """again: replay what was replayed. force: replay what would be refused once more. now_ms: the wall clock.

    future_ms_max: as models.event.parse_batch says. forgotten: users whose letters are never replayed.
    """

    now_ms: int
    again: bool = False
    force: bool = False
    future_ms_max: int = FUTURE_MS_MAX
    forgotten: Forgotten = NOBODY_FORGOTTEN


@dataclass(frozen=True, kw_only=True, slots=True)
class Decision:
    """What becomes of a chosen letter; left_out: why it is not replayed, None when it is."""

    letter: Position
    left_out: str | None


def replays_path(letters: Path) -> Path:
    """The table of claims beside that of the letters."""
    return letters.with_name(f"{letters.name}_replayed")


def read_replays(letters: Path, selection: Selection = Selection()) -> dict[Position, Replay]:
    """The replays of letters by the letters' positions. Of the selection only positions and partitions count."""
    placed = Selection(partitions=selection.partitions, positions=selection.positions)
    rows = read_rows(replays_path(letters), placed, SCHEMA.names)
    found = {}
    for row in [] if rows is None else rows.to_pylist():
        place = (row.pop("epoch"), row.pop("partition"), row.pop("offset"))
        found[place] = Replay(**row)
    return found


def turns(places: Sequence[tuple[Position, int]]) -> Iterator[tuple[Position, ...]]:
    """Positions with their sizes in bytes, in log order (retractions after their events), a memory full each."""
    turn: list[Position] = []
    held = 0
    for place, size_bytes in sorted(places):
        if turn and (len(turn) >= LETTERS_PER_TURN or held + size_bytes > BYTES_PER_TURN):
            yield tuple(turn)
            turn, held = [], 0
        turn.append(place)
        held += size_bytes
    if turn:
        yield tuple(turn)


def refusal(letter: DeadLetter, now_ms: int, future_ms_max: int = FUTURE_MS_MAX) -> str | None:
    """Why the letter's record would be refused if it were produced now; None when it is an event by now."""
    record = Records(
        epoch=letter.epoch,
        partition=letter.partition,
        offset_N=np.array([letter.offset]),
        log_time_ms_N=np.array([now_ms]),
        keys=[letter.key],
        values=[letter.value],
    )
    _, rejects = parse_batch(record, future_ms_max)
    return f"{rejects[0].reason}: {rejects[0].detail}" if rejects else None


def decide(letter: DeadLetter, topic: Topic, replay: Replay | None, rules: Rules) -> Decision:
    """Whether to replay a letter to the topic."""
    left_out = None
    if letter.detail == ERASED or letter.is_forgotten(rules.forgotten):
        left_out = ERASED
    elif letter.epoch != topic.epoch:
        left_out = (
            f"of epoch {letter.epoch}; its partition in epoch {topic.epoch} is not known: let its producer send it"
        )
    elif letter.partition not in topic.ends:
        left_out = f"the topic has no partition {letter.partition}"
    elif replay is not None and not rules.again:
        left_out = f"replayed already ({replay.words}); --again replays it once more"
    elif not rules.force and (why := refusal(letter, rules.now_ms, rules.future_ms_max)) is not None:
        left_out = f"still refused, {why}"
    return Decision(letter=letter.position, left_out=left_out)


def plan_turn(letters: Path, turn: Sequence[Position], topic: Topic, rules: Rules) -> list[Decision]:
    """The decisions about the letters at these positions; nothing is done. Raises InputError."""
    selection = Selection(positions=tuple(turn))
    replayed = read_replays(letters, selection)
    found = read_dead_letters(letters, selection)
    return [decide(letter, topic, replayed.get(letter.position), rules) for letter in found]


def replay_turn(letters: Path, turn: Sequence[Position], topic: Topic, rules: Rules) -> list[Decision]:
    """Replay the letters at these positions that are to be, and note where they are now.

    Raises StoreError when some may not have reached the topic: they stay claimed, and say so.
    """
    decisions = plan_turn(letters, turn, topic, rules)
    wanted = tuple(decision.letter for decision in decisions if decision.left_out is None)
    if not wanted:
        return decisions
    claim = uuid.uuid4().hex
    mine = _claim(
        letters, wanted, Replay(claim=claim, claimed_ms=rules.now_ms, topic=topic.identity.name, new_offset=None), rules
    )
    found = read_dead_letters(letters, Selection(positions=mine)) if mine else []
    placed, failed = _produce(topic, found)
    _settle(letters, claim, placed)
    if failed:
        first, error = next(iter(failed.items()))
        raise StoreError(
            f"{len(failed)} of {len(wanted)} letters were not confirmed by topic {topic.identity.name} (the first: "
            f"{words(first)}: {error}); look for their header {REPLAY_OF} on the topic, and replay the missing --again"
        )
    lost = set(wanted) - set(mine)
    return [
        Decision(letter=d.letter, left_out="replayed at the same time by another") if d.letter in lost else d
        for d in decisions
    ]


def _claim(letters: Path, wanted: Sequence[Position], as_: Replay, rules: Rules) -> tuple[Position, ...]:
    """Claim the letters; those that were not claimed by another in between."""
    rows = _rows(dict.fromkeys(wanted, as_))
    merge(
        replays_path(letters),
        rows,
        lambda merger: (
            merger.when_matched_update_all().when_not_matched_insert_all()
            if rules.again
            else merger.when_not_matched_insert_all()
        ),
    )
    claimed = read_replays(letters, Selection(positions=tuple(wanted)))
    return tuple(place for place in wanted if claimed[place].claim == as_.claim)


def _settle(letters: Path, claim: str, placed: Mapping[Position, int]) -> None:
    """Note the offsets that the letters of a claim got."""
    if placed:
        rows = _rows({p: Replay(claim=claim, claimed_ms=0, topic="", new_offset=o) for p, o in placed.items()})
        merge(
            replays_path(letters),
            rows,
            lambda merger: merger.when_matched_update({"new_offset": "new.new_offset"}, "old.claim = new.claim"),
        )


def _rows(replays: Mapping[Position, Replay]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            dict(zip(("epoch", "partition", "offset"), place, strict=True))
            | {name: getattr(replay, name) for name in ("claim", "claimed_ms", "topic", "new_offset")}
            for place, replay in replays.items()
        ],
        SCHEMA,
    )


def _produce(topic: Topic, letters: Sequence[DeadLetter]) -> tuple[dict[Position, int], dict[Position, str]]:
    """The offset that each letter got, and what the others failed with."""
    # Without idempotence a retry within the client could leave a letter on the topic twice.
    producer = open_producer(topic.kafka, **{"enable.idempotence": True})
    placed: dict[Position, int] = {}
    failed = {letter.position: "no answer" for letter in letters}

    def note(place: Position) -> Callable[[KafkaError | None, Message], None]:
        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is None:
                placed[place] = message.offset()
                del failed[place]
            else:
                failed[place] = error.str()

        return delivered

    for letter in letters:
        producer.produce(
            topic.identity.name,
            letter.value,
            letter.key,
            letter.partition,
            headers=[(REPLAY_OF, words(letter.position).encode())],
            on_delivery=note(letter.position),
        )
        producer.poll(0)
    producer.flush(2 * DELIVERY_WAIT_S)
    return placed, failed
