"""The compiled reads of a CPU are those of torch, whatever the masses, the ages and the number of candidates."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from models.attention import REACH_MAX, CacheBatch, Entries, read_counts, read_entries
from models.cache import CacheSpec
from models.count_kernels import BEYOND, read_counts_kernel
from models.ranker import VqlHistory
from models.read_kernels import read_kernel
from models.served import ServedRanker
from tests.models.test_ranker import new_ranker
from tests.small import HOUR_MS

HEADS, ENTRIES, ITEMS = 3, 37, 50


def read(candidates: int, users: int, widths: tuple[int, int], reach: float):
    """(compiled, torch's) of random candidates; masses span 25 orders of magnitude, some are not positive."""
    rng, (wide, deep) = np.random.default_rng(candidates), widths
    query_MHE = rng.normal(size=(ITEMS, HEADS, wide))
    key_HKE = rng.normal(size=(HEADS, ENTRIES, wide))
    key_HKE *= reach / np.abs(np.einsum("mhe,hke->mhk", query_MHE, key_HKE)).max()
    mass_BHK = 10 ** rng.uniform(-25, 0, (users, HEADS, ENTRIES)) * rng.choice(
        [-1, 0, 1, 1, 1], (users, HEADS, ENTRIES)
    )
    mass_BHK[0, 0] = -1.0
    mean_BHKD = rng.normal(size=(*mass_BHK.shape, deep))
    item_BC = rng.integers(0, ITEMS, (users, candidates))
    query_MHE, key_HKE, mass_BHK, mean_BHKD = (x.astype(np.float32) for x in (query_MHE, key_HKE, mass_BHK, mean_BHKD))
    out_BCV = np.full((users, candidates, HEADS * deep), np.nan, np.float32)
    read_kernel(wide, deep)(query_MHE.reshape(ITEMS, -1), item_BC, key_HKE, mass_BHK, mean_BHKD, out_BCV)
    log_mass_BHK = torch.from_numpy(mass_BHK).clamp(min=0).double().log()
    entries = Entries(log_mass_BHK, torch.from_numpy(mean_BHKD))
    wanted = read_entries(torch.from_numpy(query_MHE[item_BC]), torch.from_numpy(key_HKE), entries, reach)
    return out_BCV, wanted.flatten(2).numpy()


@pytest.mark.parametrize("candidates", [1, 15, 16, 17, 50])
@pytest.mark.parametrize(("reach", "error"), [(1.0, 2e-6), (REACH_MAX, 2e-5)])
def test_it_reads_as_the_products_of_torch(candidates, reach, error):
    found, wanted = read(candidates, 2, (8, 8), reach)
    np.testing.assert_allclose(found, wanted, atol=error, rtol=error)
    assert np.abs(wanted[1]).min() > 0
    # A head without a positive mass.
    assert not found[0, :, :8].any()
    assert found[0, :, 8:].any()


@pytest.mark.parametrize("widths", [(2, 3), (5, 1)])
def test_keys_and_values_may_have_any_width(widths):
    found, wanted = read(20, 3, widths, 5.0)
    np.testing.assert_allclose(found, wanted, atol=2e-5, rtol=2e-5)
    assert np.abs(found[1] - found[2]).max() > 0.1


@pytest.mark.parametrize("item", [-1, 10**6])
def test_an_item_beyond_a_table_is_refused_before_memory_beyond_it_is_read(item):
    item_BC, one = np.array([[0, item]]), np.ones((1, 1, 1), np.float32)
    with pytest.raises(IndexError, match="beyond the table of queries"):
        read_kernel(8, 8)(
            np.zeros((2, 8), np.float32),
            item_BC,
            np.zeros((1, 1, 8), np.float32),
            one,
            np.zeros((1, 1, 1, 8), np.float32),
            np.zeros((1, 2, 8), np.float32),
        )
    cells, ages, rates = np.ones((2, 1), np.int32), np.zeros(1, np.int64), np.zeros(1)
    with pytest.raises(IndexError, match="beyond the table of cells"):
        read_counts_kernel(item_BC, cells, np.ones((1, 1), np.int32), one, ages, rates, np.zeros((1, 2, 1), np.float32))


@pytest.mark.parametrize("entries", [0, 1, 2, 100])
def test_counts_are_read_as_torch_reads_them(entries):
    rng, users, rate_R = np.random.default_rng(entries), 3, np.array([0.0, 1 / HOUR_MS])
    cell_MQ = rng.integers(0, 300, (ITEMS, 2)).astype(np.int32)
    cell_BN = np.sort([rng.choice(np.arange(1, 300), entries, replace=False) for _ in range(users)]).astype(np.int32)
    cell_BN[0, entries // 2 :] = BEYOND
    mass_BNR = rng.normal(1, 1, (users, entries, 2)).astype(np.float32)
    caches = replace(
        CacheBatch.of(
            CacheSpec(checkpoint_id="c", groups=1, codewords=1, value_width=1, rate_HR=np.zeros((1, 1))), [None] * users
        ),
        cell_BN=torch.from_numpy(cell_BN),
        cell_mass_BNR=torch.from_numpy(mass_BNR),
    )
    item_BC, now_ms_B = rng.integers(0, ITEMS, (users, 40)), np.array([0, HOUR_MS, 9 * HOUR_MS])
    found = np.full((users, 40, 4), np.nan, np.float32)
    read_counts_kernel(item_BC, cell_MQ, cell_BN, mass_BNR, now_ms_B, rate_R, found)
    cell_BCQ, rates = torch.from_numpy(cell_MQ[item_BC]), torch.from_numpy(rate_R)
    wanted = read_counts(cell_BCQ, caches, rates, torch.from_numpy(now_ms_B)).numpy()
    np.testing.assert_allclose(found, wanted, rtol=1e-6)
    assert (found > 0).any() or entries < 100


@torch.inference_mode()
def test_logits_that_may_be_far_from_0_are_not_read_by_it():
    ranker = new_ranker(newest=7)
    assert isinstance(ranker.history, VqlHistory)
    assert ServedRanker(ranker).queries.compiled
    torch.nn.init.constant_(ranker.history.log_temperature_H, math.log(100.0))
    assert not ServedRanker(ranker).queries.compiled
