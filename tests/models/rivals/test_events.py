import math

import torch

from models.request import collate
from models.rivals.events import item_vectors
from models.temporal import AGE_BUCKETS, LogAge, age_bucket
from tests.models.test_ranker import impressions, new_ranker

YEAR_MS = 31_557_600_000


def test_an_age_falls_into_half_octaves_of_its_seconds():
    ages_ms = [0, 400, 1000, 2500, 60_000, 3_600_000, 86_400_000, YEAR_MS, 90 * YEAR_MS]
    wanted = [math.floor(2 * math.log2(1 + age / 1000)) for age in ages_ms]
    assert age_bucket(torch.tensor(ages_ms)).tolist() == wanted
    assert len(set(wanted)) == len(ages_ms) - 1


def test_ages_beyond_the_buckets_fall_into_the_first_and_the_last():
    assert age_bucket(torch.tensor([-5000, 10**6 * YEAR_MS])).tolist() == [0, AGE_BUCKETS - 1]


def test_the_age_is_that_at_the_request():
    age = LogAge(3)
    found = age(torch.tensor([[1000, 5000], [1000, 5000]]), torch.tensor([5000, 69_000]))
    wanted = age.bucket(age_bucket(torch.tensor([[4000, 0], [68_000, 64_000]])))
    assert torch.equal(found, wanted)


@torch.inference_mode()
def test_each_event_has_the_vector_of_its_item(tmp_path):
    encoder, request = new_ranker().encoder, collate(impressions(tmp_path)[:8])
    item_BL = request.history.item_BL
    assert torch.equal(item_vectors(encoder, item_BL), encoder(item_BL))
