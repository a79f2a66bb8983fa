"""What a checkpoint's manifest records of its codebook: how it is used, how far its attention is from the exact one.

Made by `models.quantisation`, which says what the figures mean.
"""

from __future__ import annotations

import msgspec


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """A group's codewords: how many the events have, and the perplexity exp(H) of how often they have each."""

    used: int
    perplexity: float


class Distances(msgspec.Struct, frozen=True, kw_only=True):
    """|k - c| / |k| of a group's keys, over events."""

    p50: float
    p99: float
    max: float


class AttentionError(msgspec.Struct, frozen=True, kw_only=True):
    """sum |p - p'| over a history of this length, over candidates and heads, and the mean of its bound."""

    length: int
    mean: float
    p99: float
    bound: float


class Diagnostics(msgspec.Struct, frozen=True, kw_only=True):
    """usage and key_error: one for each group. attention: one for each length."""

    usage: list[Usage]
    key_error: list[Distances]
    attention: list[AttentionError]
