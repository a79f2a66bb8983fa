"""The reader that goes on without the store: flagged users, a moment of rest for the store, and a lost one refused."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from feature_repo.opened import Opened
from feature_repo.reader import Read, Reader
from jobs.serving.patient_reader import LATE, PAUSE_S, PatientReader, StoreGate
from models.checkpoint import Checkpoint
from models.errors import StoreError, UnavailableError
from tests.jobs.serving.shop import put_rows
from tests.small import small_checkpoint


class Faulty:
    """The real reader, with a store that can be made to fail."""

    def __init__(self, reader: Reader) -> None:
        self.reader, self.error, self.asked = reader, None, 0

    def read(self, user_ids: Sequence[str]) -> Read:
        self.asked += 1
        if self.error is not None:
            raise self.error
        return self.reader.read(user_ids)


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint")


@pytest.fixture
def faulty(checkpoint: Checkpoint, tmp_path: Path) -> Faulty:
    rows = StoreHandle(state=tmp_path, redis=None).open()
    put_rows(checkpoint, rows, ["u0"])
    return Faulty(Reader(rows, Opened(checkpoint)))


def test_a_store_that_does_not_answer_leaves_users_late_and_is_left_alone_for_a_moment(checkpoint, faulty):
    clock = Clock()
    patient = PatientReader(faulty, checkpoint.spec, StoreGate(clock))
    assert patient.read(["u0", "nobody"]).missing == {"nobody": "absent"}
    faulty.error = UnavailableError("away")
    read = patient.read(["u0", "nobody"])
    assert read.missing == {"u0": LATE, "nobody": LATE}
    assert not read.caches.present_B.any()
    assert float(read.caches.mass_BHKR.sum()) == 0.0
    faulty.error = None
    assert patient.read(["u0"]).missing == {"u0": LATE}
    assert faulty.asked == 2
    clock.now_s += PAUSE_S
    assert patient.read(["u0"]).missing == {}
    assert patient.read(["u0"]).caches.present_B.tolist() == [True]


def test_the_rest_is_the_stores_so_all_checkpoints_share_it(checkpoint, faulty):
    gate = StoreGate(Clock())
    patients = [PatientReader(faulty, checkpoint.spec, gate) for _ in range(2)]
    faulty.error = UnavailableError("away")
    assert [patient.read(["u0"]).missing for patient in patients] == [{"u0": LATE}] * 2
    assert faulty.asked == 1


def test_a_lost_store_is_not_gone_on_without(checkpoint, faulty):
    faulty.error = StoreError("emptied")
    with pytest.raises(StoreError, match="emptied"):
        PatientReader(faulty, checkpoint.spec, StoreGate()).read(["u0"])
