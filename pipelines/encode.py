"""Events to the records that rows keep: a look-up of item and action, no model.

Items that the table does not hold yet become the unknown item, and actions that the checkpoint was not trained with
become "other". Both are kept, folded and counted: a rising count says that `encode-items` or a training is due.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from feature_repo.opened import Opened
from models.checkpoint import OTHER_ACTION
from models.item_table import UNKNOWN
from models.wire import pack_recent
from pipelines.metrics import process_metrics
from pipelines.parse import EventBatch
from pipelines.worker import CheckpointRef, opened_checkpoint


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Events of one partition in log order: the user of each, and its record (dtype wire.RECENT)."""

    epoch: int
    partition: int
    user_ids: list[str]
    recent: np.ndarray
    unknown_items: int
    unknown_actions: int


def encode_batch(batch: EventBatch, opened: Opened) -> EncodedBatch:
    """Look items and actions up."""
    columns = batch.columns
    item_N = opened.fold.table.lookup(columns.item_ids)
    action_N = opened.checkpoint.action_index(columns.actions)
    return EncodedBatch(
        epoch=batch.epoch,
        partition=batch.partition,
        user_ids=columns.user_ids,
        recent=pack_recent(
            columns.offset_N, columns.time_ms_N, action_N, item_N, columns.weight_N, columns.event_hash_N
        ),
        unknown_items=int((item_N == UNKNOWN).sum()),
        unknown_actions=int((action_N == 0).sum()) - columns.actions.count(OTHER_ACTION),
    )


class EncodeEvents(beam.DoFn):
    """`encode_batch` with the checkpoint of this process."""

    def __init__(self, checkpoint: CheckpointRef) -> None:
        self._ref = checkpoint
        self._unknown_items = Metrics.counter("vql", "unknown_items")
        self._unknown_actions = Metrics.counter("vql", "unknown_actions")

    def setup(self) -> None:
        self._opened = opened_checkpoint(self._ref)
        self._metrics = process_metrics()

    def process(self, batch: EventBatch) -> Iterator[EncodedBatch]:
        encoded = encode_batch(batch, self._opened)
        self._unknown_items.inc(encoded.unknown_items)
        self._unknown_actions.inc(encoded.unknown_actions)
        self._metrics.encoded(encoded.unknown_items, encoded.unknown_actions)
        yield encoded
