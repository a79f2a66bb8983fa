"""What quantisation does to a trained model's attention, measured on its own training events.

None of it is a gate: keys that collapse have a small error and a small difference of attention, and rank badly. It says
how codewords are used, and how much the answers can differ from those of exact keys.

For a candidate and a head, with logits q . k_i + bias_i over L events, p the softmax with exact keys and p' the one
with quantised keys, |q . (k_i - c_i)| <= e for all i gives e^(-2e) <= p'_i / p_i <= e^(2e), and so

    sum_i |p_i - p'_i|  <=  min(2, e^(2e) - 1)

whatever L is (the claim of VQL, arXiv 2508.17125; the bound here is by the largest error among the L events).

Shapes: N events, C candidates, as in models.ranker; F width of a group's joint key.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from models.attention import history_bias
from models.diagnostics import AttentionError, Diagnostics, Distances, Usage
from models.ranker import Ranker, VqlHistory
from models.request import Impression

LENGTHS = (100, 1_000, 10_000, 100_000)
CANDIDATES = 32


@torch.inference_mode()
def diagnose(ranker: Ranker, sample: Impression, seed: int = 0) -> Diagnostics:
    """The diagnostics of a trained VQL model on a sample of events; deterministic. Raises TypeError for another."""
    history = ranker.history
    if not isinstance(history, VqlHistory):
        raise TypeError(f"{type(history).__name__} quantises nothing")
    generator = torch.Generator().manual_seed(seed)
    item_U, at_N = torch.unique(torch.from_numpy(sample.item_L).long(), return_inverse=True)
    exact_UGF, given_U = history.grouped_keys(ranker.encoder, item_U)
    exact_UHE = exact_UGF.reshape(len(item_U), history.sizes.heads, -1)
    code_UG = history.codebook.encode(exact_UGF, given_U)
    error_UGF = history.codebook.decode(code_UG) - exact_UGF
    relative_NG = (error_UGF.norm(dim=-1) / exact_UGF.norm(dim=-1))[at_N]
    candidate_1C = torch.from_numpy(sample.candidate_C[None, :CANDIDATES]).long()
    query_CHE = history.queries(ranker.encoder(candidate_1C))[0]
    attention = [
        _attention(history, sample, query_CHE, exact_UHE, error_UGF.reshape(exact_UHE.shape), at_N, length, generator)
        for length in LENGTHS
    ]
    return Diagnostics(
        usage=[_usage(code_UG[at_N, g], history.sizes.codewords) for g in range(history.sizes.groups)],
        key_error=[_quantiles(relative_NG[:, g]) for g in range(history.sizes.groups)],
        attention=attention,
    )


def _usage(code_N: torch.Tensor, codewords: int) -> Usage:
    share_K = torch.bincount(code_N, minlength=codewords).double() / len(code_N)
    entropy = -(share_K * torch.where(share_K > 0, share_K, 1.0).log()).sum()
    return Usage(used=int((share_K > 0).sum()), perplexity=_rounded(math.exp(entropy)))


def _quantiles(relative_N: torch.Tensor) -> Distances:
    p50, p99 = np.quantile(relative_N.numpy(), [0.5, 0.99])
    return Distances(p50=_rounded(p50), p99=_rounded(p99), max=_rounded(relative_N.max().item()))


def _attention(
    history: VqlHistory,
    sample: Impression,
    query_CHE: torch.Tensor,
    exact_UHE: torch.Tensor,
    error_UHE: torch.Tensor,
    at_N: torch.Tensor,
    length: int,
    generator: torch.Generator,
) -> AttentionError:
    """Over one history of `length` events drawn from the sample."""
    drawn_L = torch.randint(len(at_N), (length,), generator=generator)
    time_ms_L = torch.from_numpy(sample.time_ms_L)[drawn_L]
    weight_L = torch.from_numpy(sample.weight_L)[drawn_L]
    bias_HL = history_bias(history.kernel(), time_ms_L[None], weight_L[None], torch.tensor([sample.now_ms]))[0]
    at_L = at_N[drawn_L]
    differences, bounds = [], []
    for h in range(exact_UHE.shape[1]):
        logit_CU = query_CHE[:, h] @ exact_UHE[:, h].T
        moved_CU = query_CHE[:, h] @ error_UHE[:, h].T
        exact_CL = torch.softmax(logit_CU[:, at_L] + bias_HL[h], dim=-1)
        quantised_CL = torch.softmax((logit_CU + moved_CU)[:, at_L] + bias_HL[h], dim=-1)
        differences.append((exact_CL - quantised_CL).abs().sum(dim=-1))
        bounds.append(torch.expm1(2 * moved_CU[:, at_L].abs().amax(dim=-1)).clamp(max=2.0))
    difference = torch.stack(differences).flatten().numpy()
    return AttentionError(
        length=length,
        mean=_rounded(difference.mean()),
        p99=_rounded(np.quantile(difference, 0.99)),
        bound=_rounded(torch.stack(bounds).mean().item()),
    )


def _rounded(value: float | np.floating) -> float:
    """Digits that a checkpoint's id should not depend on are dropped."""
    return float(f"{value:.4g}")
