"""A stream whose source delivers every batch twice, for the parity test; a module, because workers import it.

Run as a program it is killed by the test: python -m tests.twice LOG CHECKPOINT STATE DEAD_LETTERS
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import apache_beam as beam
from apache_beam.options.pipeline_options import PipelineOptions

from feature_repo.handle import StoreHandle
from models.checkpoint import open_checkpoint
from pipelines.delta_source import DeltaReader, DeltaSource
from pipelines.records import PositionMark
from pipelines.stream import IN_PROCESS, StreamPlan, build, resolve
from pipelines.worker import CheckpointRef, forget_opened


class TwiceReader(DeltaReader):
    """Says each batch again before going on to the next."""

    _again = False

    def advance(self) -> bool:
        self._again = not self._again
        return super().advance() if self._again else True


@dataclass(frozen=True, kw_only=True)
class TwiceSource(DeltaSource):
    """A DeltaSource with TwiceReader."""

    def create_reader(self, options: object, checkpoint_mark: PositionMark | None) -> TwiceReader:
        (part,) = self.slices
        return TwiceReader(
            self, part if checkpoint_mark is None else replace(part, after_offset=checkpoint_mark.offset)
        )


def run_twice(plan: StreamPlan) -> None:
    """The stream of the plan with every batch delivered twice."""
    forget_opened()
    checkpoint = open_checkpoint(plan.checkpoint_path)
    plain = resolve(plan, checkpoint.checkpoint_id)
    source = TwiceSource(path=plain.path, slices=plain.slices, ledger=plain.ledger, batch_size=plain.batch_size)
    pipeline = beam.Pipeline(options=PipelineOptions(list(IN_PROCESS)))
    build(pipeline, source, CheckpointRef(path=plan.checkpoint_path, checkpoint_id=checkpoint.checkpoint_id), plan)
    pipeline.run().wait_until_finish()


if __name__ == "__main__":
    log, checkpoint_path, state, letters = (Path(a) for a in sys.argv[1:])
    run_twice(
        StreamPlan(
            log_path=log,
            checkpoint_path=checkpoint_path,
            store=StoreHandle(state=state),
            dead_letters_path=letters,
            start="earliest",
            batch_size=9,
            bundle_s=0.05,
        )
    )
