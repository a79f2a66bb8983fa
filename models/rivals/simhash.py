"""SimHash: a vector's sides of random hyperplanes, as bits.

Two vectors are on the same side of a random hyperplane with probability 1 - angle / pi (Charikar 2002), so like vectors
share most bits. `nearest` finds events by shared bits and is the plain form; `nearest_words` is the compiled one, for
one user's bits in 64-bit words.

Shapes: B users, C candidates, L events, m bits, k events found for a candidate.
"""

from __future__ import annotations

from inspect import unwrap

import numba
import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Int64, UInt64

WORD = 64


def sides(x_Nd: Float[torch.Tensor, "*N d"], plane_dm: Float[torch.Tensor, "d m"]) -> Bool[torch.Tensor, "*N m"]:
    """Whether each vector is on the positive side of each hyperplane; no gradient passes."""
    return x_Nd.detach() @ plane_dm > 0


def nearest(
    side_BCm: Bool[torch.Tensor, "B C m"],
    side_BLm: Bool[torch.Tensor, "B L m"],
    weight_BL: Float32[torch.Tensor, "B L"],
    count: int,
) -> Int64[torch.Tensor, "B C k"]:
    """Places of the `count` events of least Hamming distance, and of equal ones the newest.

    All events, where they are fewer. Events without a positive weight come last of all.
    """
    shared_BCL = torch.einsum("bcm,blm->bcl", side_BCm.float() * 2 - 1, side_BLm.float() * 2 - 1).int()
    length = side_BLm.shape[1]
    rank_BCL = shared_BCL * length + torch.arange(length, dtype=torch.int32, device=shared_BCL.device)
    rank_BCL = rank_BCL.masked_fill((weight_BL <= 0)[:, None, :], torch.iinfo(torch.int32).min)
    return rank_BCL.topk(min(count, length)).indices


def words(side_NM: Bool[np.ndarray, "N m"]) -> UInt64[np.ndarray, "N"]:
    """WORD bits as one integer each."""
    return np.packbits(side_NM, axis=1).view(np.uint64)[:, 0]


def nearest_words(
    word_C: UInt64[np.ndarray, "C"], word_L: UInt64[np.ndarray, "L"], count: int
) -> Int64[np.ndarray, "C k"]:
    """`nearest` for one user, all of whose events have a positive weight, in any order."""
    return _nearest_kernel(word_C, word_L, min(count, len(word_L)))


def _nearest_loop(word_C, word_L, count):
    """From the newest event on, an event is kept while `count` nearer ones have not been seen.

    within counts the kept events up to the distance `far`, beyond which none is needed any more.
    """
    candidates, length = len(word_C), len(word_L)
    found_Ck = np.empty((candidates, count), np.int64)
    distance_L, kept_L = np.empty(length, np.uint8), np.empty(length, np.int64)
    for c in range(candidates):
        word = word_C[c]
        for n in range(length):
            bits = word_L[n] ^ word
            bits -= (bits >> np.uint64(1)) & np.uint64(0x5555555555555555)
            bits = (bits & np.uint64(0x3333333333333333)) + ((bits >> np.uint64(2)) & np.uint64(0x3333333333333333))
            bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
            distance_L[n] = np.uint8((bits * np.uint64(0x0101010101010101)) >> np.uint64(56))
        of_distance = np.zeros(66, np.int64)
        far, within, kept, limit = 64, 0, 0, 65
        for n in range(length - 1, -1, -1):
            distance = np.int64(distance_L[n])
            if distance < limit:
                kept_L[kept] = n
                kept += 1
                of_distance[distance] += 1
                within += 1
                while within - of_distance[far] >= count:
                    within -= of_distance[far]
                    far -= 1
                limit = far + 1 if within < count else far
        room, at = count - (within - of_distance[far]), 0
        for i in range(kept):
            distance = np.int64(distance_L[kept_L[i]])
            if distance < far or (distance == far and room > 0):
                room -= distance == far
                found_Ck[c, at] = kept_L[i]
                at += 1
    return found_Ck


# unwrap: as in models.cache.
_nearest_kernel = numba.njit(cache=True, nogil=True)(unwrap(_nearest_loop))
