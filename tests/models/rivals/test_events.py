import torch

from models.request import collate
from models.rivals.events import item_vectors
from tests.models.test_ranker import impressions, new_ranker


@torch.inference_mode()
def test_each_event_has_the_vector_of_its_item(tmp_path):
    encoder, request = new_ranker().encoder, collate(impressions(tmp_path)[:8])
    item_BL = request.history.item_BL
    assert torch.equal(item_vectors(encoder, item_BL), encoder(item_BL))
