"""Examples on disk: an impression sees what was before it, and batches are a function of files, seed and epoch."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from models.errors import InputError
from models.request import Impression, Timeline
from models.timelines import (
    EVENTS_PER_IMPRESSION,
    SCHEMA,
    Limits,
    batches,
    count_impressions,
    count_timeline_batches,
    impressions_of,
    timeline_batches,
    timeline_files,
    timelines_of,
)
from tests.small_examples import write_small_examples

USERS = 10


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return timeline_files(write_small_examples(tmp_path_factory.mktemp("examples"), USERS))


def keys(impressions: list[Impression]) -> list[tuple[str, int]]:
    return [(i.user_id, i.now_ms) for i in impressions]


def test_an_impression_is_its_row_and_sees_only_the_events_before_it(files):
    rows = {row["user_id"]: row for row in pq.read_table(files[0]).to_pylist()}
    impressions = impressions_of(files[0])
    assert len(impressions) == sum(len(row["end"]) for row in rows.values())
    for found in impressions:
        row = rows[found.user_id]
        i = row["now_ms"].index(found.now_ms)
        end = row["end"][i]
        assert found.candidate_C.tolist() == row["candidate"][i]
        assert found.label_C.tolist() == row["label"][i]
        for name in ("item", "action", "time_ms", "weight"):
            assert getattr(found, f"{name}_L").tolist() == row[name][:end]
        assert (found.time_ms_L < found.now_ms).all()


def test_impressions_are_counted_without_reading_their_candidates(files, tmp_path):
    assert count_impressions(files) == sum(len(impressions_of(f)) for f in files)
    pq.write_table(SCHEMA.empty_table(), tmp_path / "empty.parquet")
    assert count_impressions([tmp_path / "empty.parquet"]) == 0
    assert impressions_of(tmp_path / "empty.parquet") == []


def test_an_epoch_has_every_impression_once(files):
    found = list(batches(files, 7, seed=0, epoch=0))
    assert [len(batch) for batch in found[:-1]] == [7] * (len(found) - 1)
    everything = [i for f in files for i in impressions_of(f)]
    assert Counter(keys([i for batch in found for i in batch])) == Counter(keys(everything))


def test_the_order_is_a_function_of_seed_and_epoch(files):
    def order(seed: int, epoch: int) -> list[tuple[str, int]]:
        return [k for batch in batches(files, 7, seed=seed, epoch=epoch) for k in keys(batch)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


def test_a_batch_may_span_two_files(files):
    first = {i.user_id for i in impressions_of(files[0])}
    spans = [{i.user_id in first for i in batch} for batch in batches(files, 9, seed=0, epoch=0)]
    assert {True, False} in spans


def test_a_folder_without_examples_is_refused_by_name(tmp_path):
    with pytest.raises(InputError, match=f"{tmp_path} holds no examples"):
        timeline_files(tmp_path)


def test_a_user_without_impressions_gives_none(tmp_path):
    row = {name: [] for name in SCHEMA.names} | {"user_id": "u", "item": [1], "action": [0], "time_ms": [5]}
    row["weight"] = [1.0]
    pq.write_table(pa.Table.from_pylist([row], SCHEMA), tmp_path / "one.parquet")
    assert impressions_of(tmp_path / "one.parquet") == []
    assert timelines_of(tmp_path / "one.parquet") == []
    assert count_impressions([tmp_path / "one.parquet"]) == 0
    assert count_timeline_batches([tmp_path / "one.parquet"], ROOMY, seed=0, epochs=2) == 0


ROOMY = Limits(impressions=10, events=10**9)


def asked(batch: list[Timeline]) -> list[tuple[str, int]]:
    return keys([i for timeline in batch for i in timeline.impressions()])


@pytest.mark.parametrize("limits", [ROOMY, Limits(impressions=3, events=10**9), Limits(impressions=99, events=40)])
def test_an_epoch_of_timelines_has_every_impression_once_within_the_limits(files, limits):
    found = list(timeline_batches(files, limits, seed=0, epoch=0))
    everything = [i for f in files for i in impressions_of(f)]
    assert Counter(k for batch in found for k in asked(batch)) == Counter(keys(everything))
    for batch in found:
        assert len(asked(batch)) <= limits.impressions
        assert len(batch) == 1 or sum(len(t.item_L) for t in batch) <= limits.events
    # Short timelines: every impression has a pass of its own.
    assert all(len(t.end_I) == 1 for batch in found for t in batch)


@pytest.mark.parametrize(
    ("events", "passes"), [(1024, [1] * 7), (1025, [2, 2, 2, 1]), (5 * EVENTS_PER_IMPRESSION, [5, 2]), (10**5, [7])]
)
def test_a_pass_over_a_long_timeline_is_shared_by_more_impressions(tmp_path, events, passes):
    row = {"user_id": "u", "item": [1] * events, "action": [0] * events, "time_ms": list(range(events))}
    row |= {"weight": [1.0] * events, "now_ms": [events] * 7, "end": [events] * 7}
    row |= {"candidate": [[1]] * 7, "label": [[1]] * 7}
    pq.write_table(pa.Table.from_pylist([row], SCHEMA), tmp_path / "one.parquet")
    batches = timeline_batches([tmp_path / "one.parquet"], Limits(impressions=7, events=1), seed=0, epoch=0)
    assert sorted((len(t.end_I) for batch in batches for t in batch), reverse=True) == passes


def test_a_part_of_a_timeline_has_the_events_that_its_impressions_see(files):
    for batch in timeline_batches(files, Limits(impressions=3, events=10**9), seed=0, epoch=0):
        for part in batch:
            assert len(part.item_L) == len(part.time_ms_L) == part.end_I.max()


def test_batches_of_timelines_are_counted_as_they_come(files):
    for limits in (ROOMY, Limits(impressions=3, events=10**9), Limits(impressions=99, events=40)):
        made = sum(len(list(timeline_batches(files, limits, seed=2, epoch=e))) for e in range(3))
        assert count_timeline_batches(files, limits, seed=2, epochs=3) == made


def test_timelines_come_in_an_order_of_seed_and_epoch(files):
    def order(seed: int, epoch: int) -> list[tuple[str, int]]:
        return [k for batch in timeline_batches(files, ROOMY, seed=seed, epoch=epoch) for k in asked(batch)]

    assert order(0, 0) == order(0, 0)
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
