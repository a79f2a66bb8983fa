"""One impression of a rival, and its parameters in plain numpy: what its formula is written against."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from models.ranker import Ranker
from models.request import Impression, collate
from tests.models.test_ranker import impressions, new_ranker


def asked(folder: Path, model: str) -> tuple[Ranker, Impression, np.ndarray]:
    """A rival, an impression, and what the rival reads of its history for its candidates (C V, or wider)."""
    ranker, one = new_ranker(model), impressions(folder)[5]
    one = replace(one, weight_L=np.where(np.arange(len(one.weight_L)) == 1, 0.5, one.weight_L))
    with torch.no_grad():
        # Some start at zero, one or the identity: so every term of a formula counts.
        for parameter in ranker.history.parameters():
            parameter += 0.2 * torch.randn_like(parameter)
        request = collate([one])
        seen_BCV, _ = ranker.history(ranker.encoder(request.candidate_BC), ranker.encoder, request)
    return ranker, one, seen_BCV[0].numpy()


def parameters(ranker: Ranker) -> dict[str, np.ndarray]:
    """The history's parameters by name, in float64."""
    return {name: p.detach().numpy().astype(np.float64) for name, p in ranker.history.named_parameters()}


def vectors(ranker: Ranker, item_N: np.ndarray) -> np.ndarray:
    """Item vectors, N d."""
    with torch.inference_mode():
        return ranker.encoder(torch.from_numpy(item_N.astype(np.int64))).numpy().astype(np.float64)


def age_buckets(one: Impression) -> np.ndarray:
    """The bucket of each event's age at the request."""
    return np.floor(2 * np.log2(1 + (one.now_ms - one.time_ms_L) / 1000)).astype(int)


def softmax(x: np.ndarray) -> np.ndarray:
    """Over the last axis."""
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
