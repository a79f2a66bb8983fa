from __future__ import annotations

from pathlib import Path

import pytest

from feature_repo.opened import Opened
from models.event import Event, columns
from models.wire import recent_actions, recent_offsets, recent_times
from pipelines.encode import encode_batch
from pipelines.parse import EventBatch
from tests.small import ACTIONS, START_MS, small_checkpoint


@pytest.fixture
def opened(tmp_path: Path) -> Opened:
    checkpoint = small_checkpoint(tmp_path / "c")
    return Opened(checkpoint)


def event(item_id: str, action: str) -> Event:
    return Event(event_id="e", user_id="u", item_id=item_id, action=action, event_time_ms=START_MS, weight=0.5)


def test_known_items_and_actions_become_their_indices(opened: Opened) -> None:
    events = [event("i3", "purchase"), event("i50", "view"), event("i3", "other")]
    batch = EventBatch(epoch=4, partition=1, columns=columns(events, [7, 8, 9]))

    encoded = encode_batch(batch, opened)

    assert (encoded.epoch, encoded.partition, encoded.user_ids) == (4, 1, ["u", "u", "u"])
    assert encoded.recent["item"].tolist() == [3, 50, 3]
    assert recent_actions(encoded.recent).tolist() == [ACTIONS.index(e.action) for e in events]
    assert recent_offsets(encoded.recent).tolist() == [7, 8, 9]
    assert recent_times(encoded.recent).tolist() == [START_MS] * 3
    assert encoded.recent["weight"].tolist() == [0.5] * 3
    assert (encoded.unknown_items, encoded.unknown_actions) == (0, 0)


def test_unknown_items_and_actions_are_kept_and_counted(opened: Opened) -> None:
    events = [event("i3", "shout"), event("new", "view"), event("new", "shout"), event("", "other")]

    encoded = encode_batch(EventBatch(epoch=0, partition=0, columns=columns(events, [0, 1, 2, 3])), opened)

    assert len(encoded.recent) == 4
    assert encoded.recent["item"].tolist() == [3, 0, 0, 0]
    assert (encoded.unknown_items, encoded.unknown_actions) == (3, 2)
