"""A checkpoint that scores candidates from users' caches: what `vql rank`, `vql serve` and `vql bench rank` share.

The ranker and its embeddings of the items stay on the device; a batch brings item indices and caches there.

Shapes: B users, C candidates of the user of a group who has most; the others' rows are padded with the unknown item.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from feature_repo.reader import Read, Reader
from jobs.devices import usable_device
from models.attention import CacheBatch
from models.checkpoint import Checkpoint
from models.errors import InputError
from models.item_table import UNKNOWN, ItemTable
from models.load import load_ranker_of
from models.ranker import Ranker
from models.row import Fold
from models.served import ServedRanker

if TYPE_CHECKING:
    from jobs.read_log import ReadLog

CPU = torch.device("cpu")
MEANS = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True, slots=True)
class Asked:
    """One user's candidates (one or more), to be scored as of now_ms."""

    user_id: str
    item_ids: Sequence[str]
    now_ms: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Scored:
    """A logit for each candidate, in the order asked.

    history: what the user's cache was, by `Read.outcome`. unknown: the places of candidates that the item
    table does not hold; all of these have the score of the unknown item.
    """

    scores: list[float]
    history: str
    unknown: list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Scores:
    """A batch, by one checkpoint; seconds to read the caches, and to score from them."""

    checkpoint_id: str
    users: list[Scored]
    read_s: float
    score_s: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Where tensors are, and the type of the caches' means; masses are always float32.

    Half precision halves what a GPU is sent for a user. On a CPU it gains nothing.
    """

    device: torch.device = CPU
    means: torch.dtype = torch.float32

    @property
    def pass_candidates(self) -> int:
        """Candidates, all users together, of one pass of the model: on a CPU, of what stays in its caches."""
        return 1 << 10 if self.device.type == "cpu" else 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class Scorer:
    """One checkpoint, ready to score. Safe to share between threads. read_log: where a share of the reads goes."""

    checkpoint_id: str
    table: ItemTable
    served: ServedRanker
    reader: Reader
    placement: Placement
    read_log: ReadLog | None = None

    @property
    def ranker(self) -> Ranker:
        """The plain form, on the same device."""
        return self.served.ranker

    def score(self, asked: Sequence[Asked]) -> Scores:
        """The scores of these users. Raises StoreError as the reader does."""
        started_s = time.perf_counter()
        read = self.reader.read([one.user_id for one in asked])
        read_s = time.perf_counter()
        items = [self.table.lookup(one.item_ids) for one in asked]
        caches = read.caches.to(self.placement.device, self.placement.means)
        scores: list[list[float]] = [[]] * len(asked)
        for group in _alike([len(item_C) for item_C in items], self.placement.pass_candidates):
            logit_BC = self._logits([items[b] for b in group], [asked[b].now_ms for b in group], caches.take(group))
            for b, logit_C in zip(group, logit_BC.tolist(), strict=True):
                scores[b] = logit_C[: len(items[b])]
        users = [
            Scored(
                scores=scores[b],
                history=read.outcome(one.user_id),
                unknown=np.flatnonzero(items[b] == UNKNOWN).tolist(),
            )
            for b, one in enumerate(asked)
        ]
        if self.read_log is not None:
            self._log(self.read_log, asked, items, read, scores)
        return Scores(
            checkpoint_id=self.checkpoint_id,
            users=users,
            read_s=read_s - started_s,
            score_s=time.perf_counter() - read_s,
        )

    def _log(
        self,
        log: ReadLog,
        asked: Sequence[Asked],
        items: Sequence[np.ndarray],
        read: Read,
        scores: Sequence[Sequence[float]],
    ) -> None:
        from jobs.read_log import SampledRead

        for b in log.chosen([one.user_id for one in asked]):
            log.put(
                asked[b].user_id,
                SampledRead(
                    checkpoint_id=self.checkpoint_id,
                    history=read.outcome(asked[b].user_id),
                    row=read.rows[b],
                    asked_ms=asked[b].now_ms,
                    item_C=items[b],
                    # Of events whose item was not in this ranker's table yet, a later table knows more.
                    scores=None if read.unknown_items else scores[b],
                ),
            )

    def _logits(self, items: Sequence[np.ndarray], now_ms: Sequence[int], caches: CacheBatch) -> torch.Tensor:
        item_BC = items[0][None]
        if len(items) > 1:
            item_BC = np.full((len(items), max(map(len, items))), UNKNOWN)
            for b, item_C in enumerate(items):
                item_BC[b, : len(item_C)] = item_C
        # Each call to torch takes microseconds, cold several times that: on a CPU nothing is to be moved.
        candidate_BC, now_ms_B = torch.from_numpy(item_BC), torch.from_numpy(np.array(now_ms, np.int64))
        device = self.placement.device
        with torch.inference_mode():
            if device.type == "cpu":
                return self.served.from_cache(candidate_BC, caches, now_ms_B)
            return self.served.from_cache(candidate_BC.to(device), caches, now_ms_B.to(device)).cpu()


def load_scorer(checkpoint: Checkpoint, fold: Fold, reader: Reader, placement: Placement | None = None) -> Scorer:
    """Raises CheckpointError for parameters that do not fit, InputError for a model that reads no cache."""
    placement = placement or Placement()
    if checkpoint.manifest.model != "vql":
        raise InputError(f"{checkpoint.path} holds a model {checkpoint.manifest.model!r}, which reads no cache")
    ranker = load_ranker_of(checkpoint, fold.table).to(placement.device)
    return Scorer(
        checkpoint_id=checkpoint.checkpoint_id,
        table=fold.table,
        served=ServedRanker(ranker),
        reader=reader,
        placement=placement,
    )


def placed(device: str, means: str) -> Placement:
    """The placement of these names, the second one of MEANS. Raises InputError for a device that cannot be used."""
    return Placement(device=usable_device(device), means=MEANS[means])


def _alike(counts: Sequence[int], pass_candidates: int) -> list[list[int]]:
    """Places of users in groups, each for one pass; padding at most doubles what is computed for a group."""
    by_size: dict[int, list[int]] = {}
    for b, count in enumerate(counts):
        by_size.setdefault((count - 1).bit_length(), []).append(b)
    groups = []
    for bits, users in by_size.items():
        together = max(1, pass_candidates >> bits)
        groups += [users[start : start + together] for start in range(0, len(users), together)]
    return groups
