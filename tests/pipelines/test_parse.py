from __future__ import annotations

import msgspec
import numpy as np

from pipelines.dead_letters import DeadLetter
from pipelines.parse import parse_records
from pipelines.records import Records
from tests.small import random_events


def records(epoch: int, partition: int, first: int, values: list[bytes]) -> Records:
    return Records(
        epoch=epoch,
        partition=partition,
        offset_N=np.arange(first, first + len(values)),
        log_time_ms_N=np.full(len(values), -1),
        values=values,
    )


def test_events_go_on_and_the_rest_become_letters_with_their_positions() -> None:
    first, second = random_events(2)
    values = [msgspec.json.encode(first), b"\xff{", msgspec.json.encode(second), b"{}", b""]

    batch, letters = parse_records(records(2, 5, 10, values))

    assert (batch.epoch, batch.partition) == (2, 5)
    assert batch.columns.user_ids == [first.user_id, second.user_id]
    assert batch.columns.offset_N.tolist() == [10, 12]
    assert [(x.position, x.value) for x in letters] == [((2, 5, 11), b"\xff{"), ((2, 5, 13), b"{}"), ((2, 5, 14), b"")]
    assert [letter.reason for letter in letters] == ["json", "schema", "json"]
    assert all(isinstance(letter, DeadLetter) and letter.detail for letter in letters)


def test_an_empty_batch_is_no_events_and_no_letters() -> None:
    batch, letters = parse_records(records(0, 0, 0, []))

    assert (len(batch.columns), letters) == (0, [])
