"""Target attention as its paper states it, one candidate and one head at a time, in plain numpy."""

from __future__ import annotations

import numpy as np

from models.rivals.target_attention import TargetAttention


def attended(attention: TargetAttention, candidate_d: np.ndarray, event_kd: np.ndarray, weight_k: np.ndarray):
    """softmax(q . k / sqrt(E) + log w) v for each head, side by side."""
    query, key, value = (
        each.weight.detach().numpy().astype(np.float64) for each in (attention.query, attention.key, attention.value)
    )
    sizes, seen = attention.sizes, []
    for head in range(sizes.heads):
        rows = slice(head * sizes.key_width, (head + 1) * sizes.key_width)
        logit_k = event_kd @ key[rows].T @ (query[rows] @ candidate_d) / np.sqrt(sizes.key_width)
        share_k = weight_k * np.exp(logit_k - logit_k.max())
        rows = slice(head * sizes.value_width, (head + 1) * sizes.value_width)
        seen.append(share_k / share_k.sum() @ (event_kd @ value[rows].T))
    return np.concatenate(seen)
