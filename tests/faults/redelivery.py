"""A source that delivers again: the step that parses, handed every batch one to five times, and old ones later."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from models.event import Records
from pipelines.parse import ParseRecords

KEPT = 4


class RedeliveredRecords(ParseRecords):
    """Parses each batch joined to half or more of the one before, then up to copies_max - 1 times it or an old one.

    A batch that begins in the middle of another is what a reader hands out that goes on from an earlier position.
    """

    def __init__(self, copies_max: int, seed: int, future_ms_max: int) -> None:
        super().__init__(future_ms_max)
        self._copies_max = copies_max
        self._rng = np.random.default_rng(seed)
        self._old: dict[int, deque[Records]] = {}

    def process(self, records: Records) -> Iterator[Any]:
        for each in self._deliveries(records):
            yield from super().process(each)

    def _deliveries(self, records: Records) -> Iterator[Records]:
        old = self._old.setdefault(records.partition, deque(maxlen=KEPT))
        yield _joined(old[-1], records, int(len(old[-1]) * self._rng.uniform(0.5, 1.0))) if old else records
        old.append(records)
        for _ in range(int(self._rng.integers(0, self._copies_max))):
            yield records if self._rng.random() < 0.5 else old[int(self._rng.integers(len(old)))]


def _joined(before: Records, records: Records, count: int) -> Records:
    """The last `count` records of one batch and all of the next."""
    start = len(before) - count
    return replace(
        records,
        offset_N=np.concatenate([before.offset_N[start:], records.offset_N]),
        log_time_ms_N=np.concatenate([before.log_time_ms_N[start:], records.log_time_ms_N]),
        keys=[*before.keys[start:], *records.keys],
        values=[*before.values[start:], *records.values],
    )
