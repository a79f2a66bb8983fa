"""Scores from rows are those of training, for every configuration of the ablations: whatever `vql evaluate` has, and
with item features of all kinds.

Each is trained for a moment on real purchases, by the plan and into the checkpoint that `vql train` makes of its job.
The impressions of training are then scored from their raw histories, from timelines in chunks, and from rows: events
written one by one, each write reading the bytes of the one before, and the bytes read as a ranker reads them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass

import msgspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from jobs.encode_items import encode_table
from jobs.examples import Vocabulary
from jobs.study.plan import ABLATIONS, Study, Variant, check_study, variants
from jobs.train import DAY_MS, TrainJob, item_cells, plan_training, write_trained
from models.checkpoint import Checkpoint
from models.counts import CountPlan
from models.dense_caches import dense_caches
from models.item_table import append_segments
from models.load import load_ranker, load_ranker_of
from models.ranker import Ranker
from models.request import Timeline, collate, collate_timelines, counted
from models.row import Fold, RowBytes, advance, decode_row, encode_row, new_row
from models.served import ServedRanker
from models.timelines import timeline_files, timelines_of
from models.training import train, trained_ranker
from models.wire import Stamp, pack_recent
from tests.real_purchases import ACTIONS, CONTEXT, bought, vocabulary_of, with_context, write_purchases

FIELDS = ("category", "department")
STUDY = Study(
    data="completejourney",
    models=("vql",),
    protocol="raw",
    ablate=tuple(ABLATIONS),
    counts=CountPlan(fields=["item_id", *FIELDS], half_life_ms=[7 * DAY_MS, None]),
)
# Rows fold many times within a history, and the window sees some of what they keep.
JOB = TrainJob(
    log="",
    fields=FIELDS,
    sizes=msgspec.structs.replace(STUDY.sizes, window=12, newest=9),
    half_life_ms=STUDY.half_life_ms,
    epochs=4,
)
VARIANTS = {variant.name: variant for variant in variants(STUDY, JOB)}
# Beside the ablations: item features of all kinds.
CONTEXT_JOB = msgspec.structs.replace(VARIANTS["vql"].job, context=CONTEXT)
VARIANTS["vql with context"] = Variant(name="vql with context", job=CONTEXT_JOB, length=JOB.length)
# Exact counts are a dictionary of values that were met: no row holds them.
WITHOUT_ROWS = {"vql with exact counts"}
# Logits of a few units in float32, from sums of a hundred events in three orders: each is a few roundings of 1e-7 off,
# and so are the layers after them. Seen: 1e-6.
TOLERANCE = 1e-5
# What any part of a score is worth, at least, so that no path could lack it unseen.
MATTERS = 100 * TOLERANCE
HOUSEHOLDS, ASKED = 24, 8


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A configuration after its training: as it ended, and as its checkpoint gives it back.

    served: with what its item table says of items. using: what makes its rows. None where it has none.
    """

    ranker: Ranker
    loaded: Ranker
    served: Ranker | None
    using: Fold | None
    timelines: Sequence[Timeline]


@pytest.fixture(scope="module")
def purchases() -> pa.Table:
    return bought(HOUSEHOLDS, least=100, most=140)


@pytest.fixture(scope="module", params=VARIANTS)
def trained(request, purchases: pa.Table, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    variant, folder = VARIANTS[request.param], tmp_path_factory.mktemp("variant")
    job, vocabulary = variant.job, vocabulary_of(purchases, variant.job.fields)
    vocabulary = with_context(vocabulary, purchases) if job.context else vocabulary
    examples = write_purchases(purchases, vocabulary, job.examples, folder / "examples")
    plan = plan_training(job, examples, folder / "work", vocabulary, ACTIONS)
    train(plan)
    checkpoint = write_trained(job, plan, vocabulary, {}, folder / "checkpoint")
    cell_MQ = None if job.counts is None else item_cells(job.model, job.counts, vocabulary)
    loaded = load_ranker(checkpoint, vocabulary.feature_MF, cell_MQ, vocabulary.vector_MP)
    assert loaded.history.codebook.started
    using = None if variant.name in WITHOUT_ROWS else encoded(checkpoint, loaded, vocabulary, cell_MQ)
    return Trained(
        ranker=trained_ranker(plan),
        loaded=loaded,
        served=using and load_ranker_of(checkpoint, using.table),
        using=using,
        timelines=timelines_of(timeline_files(examples)[0])[:ASKED],
    )


def encoded(checkpoint: Checkpoint, ranker: Ranker, vocabulary: Vocabulary, cell_MQ: np.ndarray | None) -> Fold:
    """What makes rows, by the item table on disk. Items have the indices there that they have in the examples."""
    checkpoint.items_path.mkdir()
    segment = checkpoint.items_path / "all.parquet"
    items = (["", *vocabulary.fields["item_id"]], vocabulary.feature_MF, cell_MQ, vocabulary.vector_MP)
    pq.write_table(encode_table(ranker, *items), segment)
    append_segments(checkpoint.items_path, checkpoint.checkpoint_id, [segment])
    return checkpoint.fold()


def raw(of: Trained, ranker: Ranker) -> torch.Tensor:
    """Logits (B C) by attention over each impression's own events."""
    impressions = [one for timeline in of.timelines for one in timeline.impressions()]
    return ranker(collate(impressions, counts=counted(impressions, ranker.counter)))[0]


def in_chunks(of: Trained, ranker: Ranker) -> torch.Tensor:
    """The same from timelines that impressions share."""
    return ranker(collate_timelines(of.timelines, counted(of.timelines, ranker.counter)))[0]


def from_rows(of: Trained) -> Iterator[torch.Tensor]:
    """The same from rows, by the plain form and by the one that is served."""
    assert of.using is not None
    assert of.served is not None
    rows = [row for timeline in of.timelines for row in rows_before(timeline, of.using)]
    caches = dense_caches(rows, of.using, torch.device("cpu")).caches
    request = collate([one for timeline in of.timelines for one in timeline.impressions()], 1)
    for form in (of.served, ServedRanker(of.served)):
        yield form.from_cache(request.candidate_BC, caches, request.now_ms_B)


def rows_before(timeline: Timeline, using: Fold) -> list[RowBytes]:
    """The user's row as each impression finds it."""
    offset_L, at = np.arange(len(timeline.item_L)), Stamp(epoch=1, partition=0, offset=-1)
    event_L = pack_recent(offset_L, timeline.time_ms_L, timeline.action_L, timeline.item_L, timeline.weight_L, offset_L)
    data = [encode_row(new_row(using.spec, 1, 0))]
    for n in range(int(timeline.end_I.max())):
        row, _ = advance(decode_row(data[-1], using.spec), event_L[n : n + 1], at, using)
        data.append(encode_row(row))
    return [data[end] for end in timeline.end_I.tolist()]


@torch.inference_mode()
def test_timelines_and_rows_score_as_raw_histories(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("models.ranker.CHUNK", 16)
    wanted = raw(trained, trained.ranker)
    assert wanted.std() > 0.1
    torch.testing.assert_close(in_chunks(trained, trained.ranker), wanted, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(in_chunks(trained, trained.loaded), wanted, atol=TOLERANCE, rtol=0)
    if trained.using is not None:
        for found in from_rows(trained):
            torch.testing.assert_close(found, wanted, atol=TOLERANCE, rtol=0)


def zeroed(tensor: torch.Tensor) -> None:
    tensor.zero_()


def doubled(tensor: torch.Tensor) -> None:
    tensor.mul_(2)


# What scores are made of, by its name in the model, and how to make it another.
PARTS: dict[str, Callable[[torch.Tensor], None]] = {
    "history.kernel.rate_HR": doubled,
    "history.codebook.codeword_GKF": zeroed,
    "history.action_value_AHD": zeroed,
    "history.log_temperature_H": lambda tensor: tensor.add_(1),
    "history.window.kernel.rate_HR": doubled,
    "history.window.action_value_AHD": zeroed,
    "history.window.gate.weight": zeroed,
    "encoder.fields.3.weight": zeroed,
    "encoder.tags.0.tag.weight": zeroed,
    "encoder.vectors.projection.weight": zeroed,
    # Another cell for each value would count the same; two values in one do not.
    "cell_MQ": lambda tensor: tensor.copy_(tensor // 2),
}


@torch.inference_mode()
def test_every_part_that_a_configuration_has_decides_its_scores(trained: Trained) -> None:
    """So none of them could be missing in one of the forms, or be another there, without being seen."""
    wanted = raw(trained, trained.ranker)
    for name, change in PARTS.items():
        other = deepcopy(trained.ranker)
        part = dict((*other.named_parameters(), *other.named_buffers())).get(name)
        # Nothing to change: the configuration lacks it, or a kernel that never forgets.
        if part is not None and part.any():
            change(part)
            assert (raw(trained, other) - wanted).abs().max() > MATTERS, name
    counting = trained.ranker.counting
    if counting is not None:
        other = deepcopy(trained.ranker)
        shorter = [life and life / 2 for life in counting.half_life_ms]
        other.counting = msgspec.structs.replace(counting, half_life_ms=shorter)
        assert (raw(trained, other) - wanted).abs().max() > MATTERS


def test_rivals_alone_have_no_row() -> None:
    check_study(STUDY)
    assert {name for name, variant in VARIANTS.items() if variant.job.model != "vql"} == WITHOUT_ROWS
    assert len(VARIANTS) == 2 + sum(len(changes) for changes in ABLATIONS.values())
