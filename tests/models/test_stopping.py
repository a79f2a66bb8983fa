"""The AUC within impressions is scikit-learn's, and patience ends."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

from models.request import PADDING
from models.stopping import Patience, auc_within


def test_the_auc_within_an_impression_is_that_of_its_real_candidates():
    rng = np.random.default_rng(0)
    # Few values, so that many are equal.
    logit = rng.integers(0, 4, (50, 9)).astype(np.float32)
    label = rng.choice([0.0, 1.0, PADDING], (50, 9)).astype(np.float32)
    label[0], label[1] = 0.0, PADDING
    found = auc_within(torch.from_numpy(logit), torch.from_numpy(label)).numpy()
    for b in range(50):
        real = label[b] != PADDING
        if len(set(label[b][real])) == 2:
            np.testing.assert_allclose(found[b], roc_auc_score(label[b][real], logit[b][real]), rtol=1e-6)
        else:
            assert np.isnan(found[b])
    assert np.isfinite(found).sum() > 40


def test_patience_counts_from_the_best():
    patience = Patience()
    assert [patience.look(q) for q in (0.5, 0.6, 0.6, 0.4, 0.7)] == [True, True, False, False, True]
    assert (patience.best, patience.waited) == (0.7, 0)
    assert not patience.look(0.65)
    assert patience.waited == 1
