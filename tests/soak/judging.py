"""Whether an answer is right: of a checkpoint that was live, and wholly made by it, from one state of each user's log.

What is right is computed by other means than the product's: for each checkpoint, user and number of events, scores by
attention over that many raw events of what the topic was told. No store, row, cache or fold is part of it. An answer
has to be one of these states, of the checkpoint that it names, for each of its users:

* The checkpoint was live at some moment between the question and the answer, or a ranker had not seen yet that it is no
  more. What it has once followed it does not leave again, and it is never ahead: an answer by a checkpoint before its
  promotion is begun is wrong.
* No state is of events that had not been told, or of fewer than an answer had that was there when this was asked.

Shapes: C candidates, S states of a user: of 0, 1, ... events.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from jobs.evaluate import score_raw
from models.checkpoint import Checkpoint
from models.event import Event
from models.load import load_ranker
from models.request import Impression
from tests.soak.reading import FRESH, Answer

# Of a logit; rows are float32 and are folded in other orders. What one event changes is mostly a thousand times more.
TOLERANCE = 2e-5
ABSENT, LATE, STALE_LATE = "absent", "late", "stale_late"
WRONG_CHECKPOINT = "wrong checkpoint"
ANOTHER, NO_STATE, TOO_NEW, WENT_BACK, FLAGGED = (
    "another checkpoint's",
    "of no state",
    "too new",
    "went back",
    "flagged",
)
EXAMPLES = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Flip:
    """A checkpoint began to be live at this moment or later, by time.monotonic, instead of the one before it."""

    checkpoint_id: str
    begun_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Truth:
    """What answers are held against.

    flips: in their order; each was followed by every ranker before the next began. score_SC: by checkpoint and user.
    sent_s: by user, when each event was told. least: by checkpoint and user, how many events its rows began with.
    """

    flips: Sequence[Flip]
    score_SC: Mapping[str, Mapping[str, np.ndarray]]
    sent_s: Mapping[str, Sequence[float]]
    least: Mapping[str, Mapping[str, int]]


@dataclass(kw_only=True)
class Judged:
    """histories: users' reads by what they were made from. faults: how many of each kind, examples, and of whom."""

    answers: int = 0
    histories: Counter[str] = field(default_factory=Counter)
    by_checkpoint: Counter[str] = field(default_factory=Counter)
    faults: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    users: dict[str, set[str]] = field(default_factory=dict)
    worst: float = 0.0

    def fault(self, kind: str, answer: Answer, users: Sequence[str], *facts: object) -> None:
        self.faults[kind] += 1
        self.users.setdefault(kind, set()).update(users)
        if self.faults[kind] <= EXAMPLES:
            self.examples.append(f"{kind}: ranker {answer.ranker}, {answer.checkpoint_id[:8]}, {users}, {facts}")


def states(
    checkpoint: Checkpoint, told: Mapping[str, Sequence[Event]], questions: Mapping[str, Sequence[str]], now_ms: int
) -> dict[str, np.ndarray]:
    """By user, the scores (S C) after each number of events, from attention over the raw events."""
    table = checkpoint.fold().table
    ranker = load_ranker(checkpoint, table.feature_MF, table.cell_MQ)
    asked = []
    for user_id, candidates in questions.items():
        events = told.get(user_id, ())
        columns = {
            "item_L": table.lookup([event.item_id for event in events]),
            "action_L": checkpoint.action_index([event.action for event in events]),
            "time_ms_L": np.array([event.event_time_ms for event in events], np.int64),
            "weight_L": np.array([event.weight for event in events], np.float32),
        }
        # Raw histories are by time, rows by place in the log: of these users both are the same.
        assert (np.diff(columns["time_ms_L"]) >= 0).all()
        candidate_C = table.lookup(candidates)
        asked += [
            Impression(
                user_id=user_id,
                now_ms=now_ms,
                candidate_C=candidate_C,
                label_C=np.zeros(len(candidates)),
                **{name: column[:count] for name, column in columns.items()},
            )
            for count in range(len(events) + 1)
        ]
    score_N, at, found = score_raw(ranker, asked).logit_N, 0, {}
    for user_id, candidates in questions.items():
        size = (len(told.get(user_id, ())) + 1) * len(candidates)
        found[user_id] = score_N[at : at + size].reshape(-1, len(candidates))
        at += size
    return found


def smallest_gap(first: Mapping[str, np.ndarray], second: Mapping[str, np.ndarray]) -> float:
    """How far at least any state of a user by one checkpoint is from any by the other."""
    return min(float(np.abs(first[user_id][:, None] - second[user_id]).max(axis=-1).min()) for user_id in first)


def judge(answers: Sequence[Answer], truth: Truth) -> Judged:
    """Every answer against the truth."""
    judged = Judged(answers=len(answers))
    _judge_checkpoints(answers, truth.flips, judged)
    reads: dict[tuple[str, str], list[tuple[Answer, int]]] = {}
    for answer in sorted(answers, key=lambda answer: answer.received_s):
        for n, user_id in enumerate(answer.users):
            reads.setdefault((answer.checkpoint_id, user_id), []).append((answer, n))
    for (checkpoint_id, user_id), of_user in reads.items():
        if checkpoint_id in truth.score_SC:
            _judge_reads(checkpoint_id, user_id, of_user, truth, judged)
    return judged


def _judge_checkpoints(answers: Sequence[Answer], flips: Sequence[Flip], judged: Judged) -> None:
    """By ranker: not before a flip was begun, and not after the next one was followed."""
    begun_s = [flip.begun_s for flip in flips]
    for ranker in {answer.ranker for answer in answers}:
        # The newest flip that this ranker is known to have followed, and since when.
        known_s, followed = [-np.inf], [0]
        for answer in sorted((a for a in answers if a.ranker == ranker), key=lambda a: a.received_s):
            judged.by_checkpoint[answer.checkpoint_id] += 1
            first = followed[bisect_left(known_s, answer.sent_s) - 1]
            possible = range(first, bisect_right(begun_s, answer.received_s))
            by = [n for n in possible if flips[n].checkpoint_id == answer.checkpoint_id]
            if not by:
                judged.fault(WRONG_CHECKPOINT, answer, answer.users, [flips[n].checkpoint_id[:8] for n in possible])
            elif by[0] > followed[-1]:
                known_s.append(answer.received_s)
                followed.append(by[0])


def _judge_reads(
    checkpoint_id: str, user_id: str, reads: Sequence[tuple[Answer, int]], truth: Truth, judged: Judged
) -> None:
    """One user's reads by one checkpoint, in the order in which they came."""
    score_SC, sent_s = truth.score_SC[checkpoint_id][user_id], truth.sent_s.get(user_id, ())
    least = truth.least[checkpoint_id].get(user_id, 0)
    known_s, known = [-np.inf], [least]
    for answer, n in reads:
        history = answer.histories[n]
        judged.histories[history] += 1
        error_S = np.abs(score_SC - answer.score_UC[n]).max(axis=1)
        lowest = known[bisect_left(known_s, answer.sent_s) - 1]
        # Nothing was read, which is said; what was read last, which is; or the row as it is.
        first, end = {
            LATE: (0, 1),
            ABSENT: (lowest, 1),
            STALE_LATE: (max(least, 1), bisect_right(sent_s, answer.received_s) + 1),
            FRESH: (max(lowest, 1), bisect_right(sent_s, answer.received_s) + 1),
        }.get(history, (0, 0))
        fits = first + np.flatnonzero(error_S[first:end] <= TOLERANCE)
        if len(fits):
            judged.worst = max(judged.worst, float(error_S[fits].min()))
            if history == FRESH and fits[0] > known[-1]:
                known_s.append(answer.received_s)
                known.append(int(fits[0]))
            continue
        others = [scores[user_id] for other, scores in truth.score_SC.items() if other != checkpoint_id]
        judged.fault(_kind(history, error_S, end, answer.score_UC[n], others), answer, [user_id], history, (first, end))


def _kind(history: str, error_S: np.ndarray, end: int, score_C: np.ndarray, others: Sequence[np.ndarray]) -> str:
    """Why a read fits no state that it may."""
    if history not in (LATE, ABSENT, STALE_LATE, FRESH):
        return FLAGGED
    fits = np.flatnonzero(error_S <= TOLERANCE)
    if len(fits):
        return TOO_NEW if fits[0] >= end else WENT_BACK
    if any((np.abs(other_SC - score_C).max(axis=1) <= TOLERANCE).any() for other_SC in others):
        return ANOTHER
    return NO_STATE
