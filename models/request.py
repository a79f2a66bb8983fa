"""What a ranker is asked: candidates for users at a time, with each user's history as item indices.

A `Request` has a history for each impression. A `TimelineBatch` has a timeline's events once, for all of its
impressions that are asked together: the form that VQL is trained on.

Shapes: B requests or impressions, C candidates, L events of the longest history, M events of all timelines, I
impressions of a user. Padding has weight 0 (events) or label -1 (candidates). Indices are rows of the feature table: 0
is the unknown item. X numbers of counts (`models.counts`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float32, Int64

from models.counts import Asked, Counter

PADDING = -1


@dataclass(frozen=True, kw_only=True, slots=True)
class History:
    """Raw events of B users, oldest first and padded on the left, so that the newest W are the last W columns."""

    item_BL: Int64[torch.Tensor, "B L"]
    action_BL: Int64[torch.Tensor, "B L"]
    time_ms_BL: Int64[torch.Tensor, "B L"]
    weight_BL: Float32[torch.Tensor, "B L"]

    @classmethod
    def empty(cls, users: int) -> History:
        """No events, and no columns."""
        none_BL = torch.zeros(users, 0, dtype=torch.int64)
        return cls(item_BL=none_BL, action_BL=none_BL, time_ms_BL=none_BL, weight_BL=torch.zeros(users, 0))

    def newest(self, length: int) -> History:
        """The last `length` events of each user."""
        return History(
            item_BL=self.item_BL[:, -length:],
            action_BL=self.action_BL[:, -length:],
            time_ms_BL=self.time_ms_BL[:, -length:],
            weight_BL=self.weight_BL[:, -length:],
        )

    def to(self, device: torch.device) -> History:
        return History(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """Candidates to score for B users at their times, and what happened (1, 0, or -1 for padding).

    count_BCX: how often each user has met each candidate and its like; X is 0 where nothing is counted.
    """

    candidate_BC: Int64[torch.Tensor, "B C"]
    label_BC: Float32[torch.Tensor, "B C"]
    now_ms_B: Int64[torch.Tensor, "B"]
    history: History
    count_BCX: Float32[torch.Tensor, "B C X"]

    def to(self, device: torch.device) -> Request:
        """The same, on this device."""
        return Request(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def items(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct items of the histories, and how many events each has."""
        return torch.unique(self.history.item_BL[self.history.weight_BL > 0], return_counts=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class TimelineBatch:
    """Candidates of B impressions, and users' events, one user after another and each user's oldest first.

    Impression b sees the events first_B[b]:end_B[b], of which the first is its user's oldest.
    """

    candidate_BC: Int64[torch.Tensor, "B C"]
    label_BC: Float32[torch.Tensor, "B C"]
    now_ms_B: Int64[torch.Tensor, "B"]
    first_B: Int64[torch.Tensor, "B"]
    end_B: Int64[torch.Tensor, "B"]
    item_M: Int64[torch.Tensor, "M"]
    action_M: Int64[torch.Tensor, "M"]
    time_ms_M: Int64[torch.Tensor, "M"]
    weight_M: Float32[torch.Tensor, "M"]
    count_BCX: Float32[torch.Tensor, "B C X"]

    def to(self, device: torch.device) -> TimelineBatch:
        """The same, on this device."""
        return TimelineBatch(**{field.name: getattr(self, field.name).to(device) for field in fields(self)})

    def items(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The distinct items of the timelines, and how many events each has: every event counts once."""
        return torch.unique(self.item_M[self.weight_M > 0], return_counts=True)


@dataclass(frozen=True, kw_only=True, slots=True)
class Impression:
    """One user's candidates at now_ms and the events strictly before it, oldest first (numpy, unpadded)."""

    user_id: str
    now_ms: int
    candidate_C: np.ndarray
    label_C: np.ndarray
    item_L: np.ndarray
    action_L: np.ndarray
    time_ms_L: np.ndarray
    weight_L: np.ndarray

    def counts(self, counter: Counter) -> list[np.ndarray]:
        """How often the user has met each candidate and its like (C X), as the one of a list."""
        asked = Asked(len(self.item_L), self.now_ms, self.candidate_C)
        return counter.of_timeline(self.item_L, self.time_ms_L, self.weight_L, [asked])


@dataclass(frozen=True, kw_only=True, slots=True)
class Timeline:
    """One user's events, oldest first, and impressions: number i sees the events before end_I[i] (numpy, unpadded)."""

    user_id: str
    item_L: np.ndarray
    action_L: np.ndarray
    time_ms_L: np.ndarray
    weight_L: np.ndarray
    now_ms_I: np.ndarray
    end_I: np.ndarray
    candidates: Sequence[np.ndarray]
    labels: Sequence[np.ndarray]

    def impressions(self) -> list[Impression]:
        """One by one; they share the arrays of events."""
        return [
            Impression(
                user_id=self.user_id,
                now_ms=int(self.now_ms_I[i]),
                candidate_C=self.candidates[i],
                label_C=self.labels[i],
                item_L=self.item_L[:end],
                action_L=self.action_L[:end],
                time_ms_L=self.time_ms_L[:end],
                weight_L=self.weight_L[:end],
            )
            for i, end in enumerate(self.end_I.tolist())
        ]

    def counts(self, counter: Counter) -> list[np.ndarray]:
        """How often the user has met each candidate and its like, for each impression (C X)."""
        asked = [
            Asked(end, now_ms, candidate_C)
            for end, now_ms, candidate_C in zip(
                self.end_I.tolist(), self.now_ms_I.tolist(), self.candidates, strict=True
            )
        ]
        return counter.of_timeline(self.item_L, self.time_ms_L, self.weight_L, asked)

    def part(self, first: int, until: int) -> Timeline:
        """The impressions of these numbers, with the events that they see."""
        end = int(self.end_I[first:until].max())
        return Timeline(
            user_id=self.user_id,
            item_L=self.item_L[:end],
            action_L=self.action_L[:end],
            time_ms_L=self.time_ms_L[:end],
            weight_L=self.weight_L[:end],
            now_ms_I=self.now_ms_I[first:until],
            end_I=self.end_I[first:until],
            candidates=self.candidates[first:until],
            labels=self.labels[first:until],
        )


def counted(share: Sequence[Impression | Timeline], counter: Counter | None) -> list[np.ndarray] | None:
    """The counts of all impressions in their order, in one pass over each timeline; None where nothing is counted.

    Of all events before the impression, however few are attended to: a row has them all too.
    """
    return None if counter is None else [count_CX for one in share for count_CX in one.counts(counter)]


def collate(
    impressions: Sequence[Impression], length: int | None = None, counts: Sequence[np.ndarray] | None = None
) -> Request:
    """A batch of impressions, each with its newest `length` events (all, when None), and their counts (`counted`)."""
    longest = max(1, *(len(i.item_L) for i in impressions))
    width = min(longest, length or longest)

    def history(name: str, dtype: type) -> torch.Tensor:
        out = np.zeros((len(impressions), width), dtype)
        for b, impression in enumerate(impressions):
            values = getattr(impression, name)[-width:]
            out[b, width - len(values) :] = values
        return torch.from_numpy(out)

    return Request(
        candidate_BC=_padded([i.candidate_C for i in impressions], np.int64, 0),
        label_BC=_padded([i.label_C for i in impressions], np.float32, PADDING),
        now_ms_B=torch.tensor([i.now_ms for i in impressions], dtype=torch.int64),
        history=History(
            item_BL=history("item_L", np.int64),
            action_BL=history("action_L", np.int64),
            time_ms_BL=history("time_ms_L", np.int64),
            weight_BL=history("weight_L", np.float32),
        ),
        count_BCX=_padded_counts(counts, [i.candidate_C for i in impressions]),
    )


def collate_timelines(timelines: Sequence[Timeline], counts: Sequence[np.ndarray] | None = None) -> TimelineBatch:
    """A batch of timelines, each with the events that its impressions see, and their counts (`counted`)."""
    first = 0
    of_user: dict[str, list[np.ndarray]] = {name: [] for name in ("item_L", "action_L", "time_ms_L", "weight_L")}
    firsts, ends = [], []
    for timeline in timelines:
        end = int(timeline.end_I.max())
        for name, parts in of_user.items():
            parts.append(getattr(timeline, name)[:end])
        firsts.append(np.full(len(timeline.end_I), first))
        ends.append(first + timeline.end_I)
        first += end

    def joined(parts: Sequence[np.ndarray], dtype: type) -> torch.Tensor:
        return torch.from_numpy(np.concatenate(parts).astype(dtype))

    return TimelineBatch(
        candidate_BC=_padded([c for t in timelines for c in t.candidates], np.int64, 0),
        label_BC=_padded([c for t in timelines for c in t.labels], np.float32, PADDING),
        now_ms_B=joined([t.now_ms_I for t in timelines], np.int64),
        first_B=joined(firsts, np.int64),
        end_B=joined(ends, np.int64),
        item_M=joined(of_user["item_L"], np.int64),
        action_M=joined(of_user["action_L"], np.int64),
        time_ms_M=joined(of_user["time_ms_L"], np.int64),
        weight_M=joined(of_user["weight_L"], np.float32),
        count_BCX=_padded_counts(counts, [c for t in timelines for c in t.candidates]),
    )


def _padded(rows: Sequence[np.ndarray], dtype: type, padding: int) -> torch.Tensor:
    """One row each, filled up to the longest."""
    out = np.full((len(rows), max(map(len, rows))), padding, dtype)
    for b, row in enumerate(rows):
        out[b, : len(row)] = row
    return torch.from_numpy(out)


def _padded_counts(counts: Sequence[np.ndarray] | None, candidates: Sequence[np.ndarray]) -> torch.Tensor:
    """The counts of each impression's candidates (B C X), 0 for padding; X is 0 for None."""
    width = 0 if counts is None else counts[0].shape[1]
    out = np.zeros((len(candidates), max(map(len, candidates)), width), np.float32)
    for b, count_CX in enumerate(counts or ()):
        out[b, : len(count_CX)] = count_CX
    return torch.from_numpy(out)
