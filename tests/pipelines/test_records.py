from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from pipelines.records import Ledger, PositionCoder, PositionMark
from pipelines.worker import forget_opened

ID = "ab" * 16


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    forget_opened()
    return Ledger(store=StoreHandle(state=tmp_path), checkpoint_id=ID, epoch=3)


def test_a_finalised_mark_commits_its_position(ledger: Ledger) -> None:
    PositionMark(ledger=ledger, partition=2, offset=77).finalize_checkpoint()

    assert ledger.store.open().positions(ID) == {2: (3, 77)}


def test_marks_finalised_late_do_not_take_the_position_back(ledger: Ledger) -> None:
    for offset in (77, 50):
        PositionMark(ledger=ledger, partition=2, offset=offset).finalize_checkpoint()

    assert ledger.store.open().positions(ID) == {2: (3, 77)}


def test_a_decoded_mark_is_the_mark(ledger: Ledger) -> None:
    coder = pickle.loads(pickle.dumps(PositionCoder(ledger)))
    mark = PositionMark(ledger=ledger, partition=2, offset=-1)

    assert coder.decode(coder.encode(mark)) == mark
    assert coder.is_deterministic()
    assert coder.encode(coder.decode(coder.encode(mark))) == coder.encode(mark)
