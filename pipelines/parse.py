"""Records to checked events: what is no event goes to the dead letters, the rest on as columns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import apache_beam as beam
import numpy as np
from apache_beam.metrics import Metrics

from models.event import FUTURE_MS_MAX, EventColumns, Records, parse_batch
from pipelines.dead_letters import DeadLetter
from pipelines.metrics import process_metrics

LETTERS = "letters"


@dataclass(frozen=True, kw_only=True, slots=True)
class EventBatch:
    """Checked events of one partition, in log order."""

    epoch: int
    partition: int
    columns: EventColumns


def parse_records(records: Records, future_ms_max: int = FUTURE_MS_MAX) -> tuple[EventBatch, list[DeadLetter]]:
    """The events among the records, and a letter for each of the others."""
    columns, rejects = parse_batch(records, future_ms_max)
    letters = [
        DeadLetter(
            epoch=records.epoch,
            partition=records.partition,
            offset=reject.offset,
            reason=reject.reason,
            detail=reject.detail,
            value=reject.value,
            key=reject.key,
            log_time_ms=reject.log_time_ms,
        )
        for reject in rejects
    ]
    return EventBatch(epoch=records.epoch, partition=records.partition, columns=columns), letters


class ParseRecords(beam.DoFn):
    """`parse_records`; dead letters go to the output LETTERS."""

    def __init__(self, future_ms_max: int = FUTURE_MS_MAX) -> None:
        self._future_ms_max = future_ms_max
        self._records = Metrics.counter("vql", "records_read")

    def setup(self) -> None:
        self._metrics = process_metrics()

    def process(self, records: Records) -> Iterator[EventBatch | beam.pvalue.TaggedOutput]:
        self._metrics.begun()
        self._records.inc(len(records))
        batch, letters = parse_records(records, self._future_ms_max)
        good_N = np.searchsorted(records.offset_N, batch.columns.offset_N)
        self._metrics.taken(records.partition, batch.columns.offset_N, records.log_time_ms_N[good_N])
        if letters:
            self._metrics.dead_letters(letter.reason for letter in letters)
            yield beam.pvalue.TaggedOutput(LETTERS, letters)
        if len(batch.columns):
            yield batch
