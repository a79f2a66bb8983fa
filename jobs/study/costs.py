"""What a model costs who serves it: parameters, bytes kept for a user, milliseconds for 500 candidates.

vql is measured as it serves: its rows as the store would hold them, and scores from caches by `models.served`. All
others are timed on raw events that are at hand already; what is spent to fetch them is `vql bench rank`'s to say.

Shapes: as in models.ranker.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch

from models.attention import CacheBatch
from models.checkpoint import Checkpoint
from models.count_kernels import NO_CELL
from models.item_table import ItemTable
from models.model_names import counts_exactly
from models.newest import newest_of
from models.ranker import Ranker, VqlHistory
from models.request import Impression, collate, counted
from models.rivals.events import EVENT_BYTES
from models.row import Fold, Row, advance, encode_row, new_row, whole_cache, whole_counts
from models.served import ServedRanker
from models.wire import Stamp, pack_recent

CANDIDATES = 500
# The users with the longest histories are measured: few have all the events that a study's length allows.
USERS = 20
REPEATS = 5


@dataclass(frozen=True, kw_only=True, slots=True)
class Costs:
    """parameters_of_ids: of the embedding of item ids alone. bytes_per_user, ms_per_500: of the longest histories."""

    parameters: int
    parameters_of_ids: int
    bytes_per_user: float
    ms_per_500: float


def costs(ranker: Ranker, checkpoint: Checkpoint, impressions: Sequence[Impression], length: int) -> Costs:
    """The costs of a ranker whose users have the histories of these impressions, cut to the newest `length` events."""
    last = {impression.user_id: impression for impression in impressions}
    longest = sorted(last.values(), key=lambda impression: -len(impression.item_L))[:USERS]
    candidate_BC = torch.from_numpy(
        np.random.default_rng(0).integers(1, len(ranker.encoder.feature_MF), (1, CANDIDATES))
    )
    if isinstance(ranker.history, VqlHistory) and not counts_exactly(checkpoint.manifest.model):
        fold = folded(ranker, checkpoint)
        rows = [row_of(impression, fold, length) for impression in longest]
        bytes_per_user = float(np.mean([encode_row(row).size_bytes for row in rows]))
        served = ServedRanker(ranker)
        calls = [_from_cache(served, candidate_BC, row, fold, one) for row, one in zip(rows, longest, strict=True)]
    else:
        bytes_per_user = float(np.mean([_events_bytes(ranker, impression, length) for impression in longest]))
        calls = [_from_events(ranker, candidate_BC, impression, length) for impression in longest]
    return Costs(
        parameters=sum(p.numel() for p in ranker.parameters()),
        parameters_of_ids=ranker.encoder.fields[0].weight.numel(),
        bytes_per_user=bytes_per_user,
        ms_per_500=_median_ms(calls),
    )


@torch.inference_mode()
def folded(ranker: Ranker, checkpoint: Checkpoint) -> Fold:
    """What makes rows of events that name items by the ranker's own indices."""
    history = ranker.history
    assert isinstance(history, VqlHistory)
    encoder = ranker.encoder
    feature_MF = encoder.features(torch.arange(len(encoder.feature_MF)))
    x_Md = encoder.encode(feature_MF)
    table = ItemTable(
        checkpoint_id=checkpoint.checkpoint_id,
        index={},
        code_MG=history.codes(x_Md, feature_MF).numpy().astype(np.uint16),
        feature_MF=encoder.feature_MF.numpy(),
        cell_MQ=ranker.cell_MQ.numpy().astype(np.uint16),
        value_MHD=history.values(x_Md).numpy(),
        action_value_AHD=history.action_value_AHD.numpy(),
    )
    manifest = checkpoint.manifest
    sizes = manifest.sizes
    return Fold(spec=checkpoint.spec, window=sizes.window, newest=sizes.newest, table=table, counting=manifest.counts)


def _events_bytes(ranker: Ranker, impression: Impression, length: int) -> float:
    """What a model that reads events needs of a user; exact counts, if any, as a number and a sum for each value."""
    events = min(length, len(impression.item_L))
    history = ranker.history
    of_events = events * EVENT_BYTES if isinstance(history, VqlHistory) else history.user_bytes(events)
    if ranker.counting is None:
        return of_events
    values = np.setdiff1d(ranker.cell_MQ.numpy()[impression.item_L], NO_CELL)
    return of_events + len(values) * (4 + 4 * len(ranker.counting.half_life_ms))


def row_of(impression: Impression, using: Fold, length: int) -> Row:
    """The row of a user with the newest events of an impression's history."""
    item_L, action_L, time_ms_L, weight_L = (
        getattr(impression, name)[-length:] for name in ("item_L", "action_L", "time_ms_L", "weight_L")
    )
    offset_L = np.arange(len(item_L))
    events = pack_recent(offset_L, time_ms_L, action_L, item_L, weight_L, offset_L)
    row, _ = advance(new_row(using.spec, 0, 0), events, Stamp(epoch=0, partition=0, offset=-1), using)
    return row


def _from_cache(
    served: ServedRanker, candidate_BC: torch.Tensor, row: Row, using: Fold, impression: Impression
) -> Callable[[], object]:
    counts = None if using.counting is None else [whole_counts(row, using)]
    caches = CacheBatch.of(using.spec, [whole_cache(row, using)], counts, newest_of([row], using))
    now_ms_B = torch.tensor([impression.now_ms])
    return lambda: served.from_cache(candidate_BC, caches, now_ms_B)


def _from_events(
    ranker: Ranker, candidate_BC: torch.Tensor, impression: Impression, length: int
) -> Callable[[], object]:
    candidate_C = candidate_BC[0].numpy()
    asked = replace(impression, candidate_C=candidate_C, label_C=np.zeros(len(candidate_C)))
    request = collate([asked], length, counted([asked], ranker.counter))
    return lambda: ranker(request)


@torch.inference_mode()
def _median_ms(calls: Sequence[Callable[[], object]]) -> float:
    """Of REPEATS calls each, of which the first is not counted."""
    taken_ms = []
    for call in calls:
        call()
        for _ in range(REPEATS):
            started_s = time.perf_counter()
            call()
            taken_ms.append((time.perf_counter() - started_s) * 1e3)
    return median(taken_ms)
