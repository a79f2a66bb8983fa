"""Ages as buckets."""

import math

import torch

from models.temporal import AGE_BUCKETS, LogAge, age_bucket

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
