import numpy as np
import pytest
import torch

from models.ranker import Shape
from models.request import collate
from models.rivals import sim
from models.rivals.sim import AGES, HOUR_MS, SimHistory, ages
from tests.models.rivals.attend import attended
from tests.models.test_ranker import LIVES, impressions, new_ranker
from tests.small_examples import ITEMS, SIZES, feature_table


@torch.inference_mode()
def test_sim_is_the_formula_of_its_paper(tmp_path, monkeypatch):
    """Attention over the k newest events of the candidate's category, each with its age; zeros without one."""
    monkeypatch.setattr(sim, "NEWEST", 3)
    ranker, category = new_ranker("sim"), feature_table()[:, 1]
    history, encoder, found = ranker.history, ranker.encoder, set()
    for one in impressions(tmp_path)[:8]:
        request = collate([one])
        seen, _ = history(encoder(request.candidate_BC), encoder, request)
        for c, item in enumerate(one.candidate_C):
            same = np.flatnonzero(category[one.item_L] == category[item])[-3:]
            found.add(len(same))
            event_kd = (
                encoder(torch.from_numpy(one.item_L[same].astype(np.int64)))
                + history.action(torch.from_numpy(one.action_L[same].astype(np.int64)))
                + history.age(ages(torch.from_numpy(one.now_ms - one.time_ms_L[same])))
            ).numpy()
            target = encoder(torch.tensor(int(item))).numpy()
            wanted = attended(history.attention, target, event_kd, one.weight_L[same]) if len(same) else 0.0
            assert seen[0, c].numpy() == pytest.approx(wanted, abs=1e-5)
    assert found == {0, 1, 2, 3}


def test_an_items_category_is_its_id_where_there_is_no_other_field():
    def field(rows: list[int]) -> int:
        return SimHistory(Shape(sizes=SIZES, half_life_ms=LIVES[1], actions=2, field_rows=rows)).category_field

    assert field([ITEMS + 1]) == 0
    assert field([ITEMS + 1, 5, 7]) == 1


def test_ages_double():
    hours = torch.tensor([-5.0, 0.0, 0.9, 1.0, 2.9, 3.0, 1e9])
    assert ages((hours * HOUR_MS).long()).tolist() == [0, 0, 0, 1, 1, 2, AGES - 1]
