"""What a ranker is asked: candidates for users at a time, with each user's history as item indices.

Shapes: B requests, C candidates, L events of the longest history. Padding has weight 0 (events) or label -1
(candidates). Indices are rows of the feature table: 0 is the unknown item. X numbers of counts (`models.counts`).
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

    def counts(self, counter: Counter) -> np.ndarray:
        """How often the user has met each candidate and its like (C X)."""
        asked = Asked(len(self.item_L), self.now_ms, self.candidate_C)
        return counter.of_timeline(self.item_L, self.time_ms_L, self.weight_L, [asked])[0]


def collate(impressions: Sequence[Impression], length: int | None = None, counter: Counter | None = None) -> Request:
    """A batch of impressions, each with its newest `length` events (all, when None).

    Counts are of all events before the impression, however few are attended to: a row has them all too.
    """
    longest = max(1, *(len(i.item_L) for i in impressions))
    width = min(longest, length or longest)
    candidates = max(len(i.candidate_C) for i in impressions)

    def history(name: str, dtype: type) -> torch.Tensor:
        out = np.zeros((len(impressions), width), dtype)
        for b, impression in enumerate(impressions):
            values = getattr(impression, name)[-width:]
            out[b, width - len(values) :] = values
        return torch.from_numpy(out)

    candidate_BC = np.zeros((len(impressions), candidates), np.int64)
    label_BC = np.full((len(impressions), candidates), PADDING, np.float32)
    count_BCX = np.zeros((len(impressions), candidates, 0 if counter is None else counter.plan.width), np.float32)
    for b, impression in enumerate(impressions):
        if counter is not None:
            count_BCX[b, : len(impression.candidate_C)] = impression.counts(counter)
        candidate_BC[b, : len(impression.candidate_C)] = impression.candidate_C
        label_BC[b, : len(impression.label_C)] = impression.label_C
    return Request(
        candidate_BC=torch.from_numpy(candidate_BC),
        label_BC=torch.from_numpy(label_BC),
        now_ms_B=torch.tensor([i.now_ms for i in impressions], dtype=torch.int64),
        history=History(
            item_BL=history("item_L", np.int64),
            action_BL=history("action_L", np.int64),
            time_ms_BL=history("time_ms_L", np.int64),
            weight_BL=history("weight_L", np.float32),
        ),
        count_BCX=torch.from_numpy(count_BCX),
    )
