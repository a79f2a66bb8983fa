"""The compiled form of `models.attention.read_entries` on a CPU: logits, exponentials and sums of a user in registers.

One entry meets sixteen candidates at a time, side by side in a vector of the processor: E products give their logits,
ten instructions the exponentials, D + 1 products add them to numerators and denominators. Nothing in between is
written to memory, and that it is so, is not left to the compiler: the inner loop is spelled in vectors, which LLVM fits
to the machine's.

Shapes: as in `models.attention`; M items of a table, X = H * E, V = H * D; S candidates side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache
from inspect import unwrap

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from models.memory import prefetch

LANES = 16
CACHE_LINE_BYTES = 64
LOG2_E = np.float32(1 / math.log(2))
# 2**f for -1/2 <= f <= 1/2, lowest power first: relative error 1.6e-7 at most (interpolated at Chebyshev's nodes).
EXP2 = (1.0000001, 0.6931472, 0.24022107, 0.05550357, 0.009676032, 0.0013390863)
# A float32 of this size has no fraction: what is added to it is rounded, and its lowest bits are the integer.
ROUNDER, EXPONENT_BIT = 1.5 * 2**23, 23

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)


def _attend():
    def typed(typing_context, query_ES, key_KE, moment_KX, entries, out_DS, key_width, value_width):
        """Addresses of contiguous float32, and their shapes; the widths are known to the compiler. X = D + 1."""
        wide, deep = key_width.literal_value, value_width.literal_value

        def generate(context, builder, signature, arguments):
            query, key, moment, out = (builder.inttoptr(arguments[n], _FLOAT.as_pointer()) for n in (0, 1, 2, 4))
            query_E = [builder.load(_lanes_at(builder, query, e), align=4) for e in range(wide)]
            before, loop, after = builder.block, builder.append_basic_block(), builder.append_basic_block()
            builder.branch(loop)
            builder.position_at_end(loop)
            k, sum_X = builder.phi(_LONG), [builder.phi(_FLOATS) for _ in range(deep + 1)]
            logit = _all(0.0)
            for e in range(wide):
                logit = _multiply_add(builder, query_E[e], _number(builder, key, k, wide, e), logit)
            weight = _exp2(builder, logit)
            added_X = [
                _multiply_add(builder, weight, _number(builder, moment, k, deep + 1, x), sum_X[x])
                for x in range(deep + 1)
            ]
            following = builder.add(k, _LONG(1))
            for phi, start, end in [
                (k, _LONG(0), following),
                *zip(sum_X, [_all(0.0)] * (deep + 1), added_X, strict=True),
            ]:
                phi.add_incoming(start, before)
                phi.add_incoming(end, loop)
            builder.cbranch(builder.icmp_signed("<", following, arguments[3]), loop, after)
            builder.position_at_end(after)
            for d in range(deep):
                builder.store(builder.fdiv(added_X[d], added_X[deep]), _lanes_at(builder, out, d), align=4)
            return context.get_dummy_value()

        return types.void(*[types.int64] * 5, key_width, value_width), generate

    return intrinsic(prefer_literal=True)(unwrap(typed))


def _lanes_at(builder, pointer, row):
    return builder.bitcast(builder.gep(pointer, [_LONG(row * LANES)]), _FLOATS.as_pointer())


def _all(number):
    return ir.Constant(_FLOATS, [number] * LANES)


def _number(builder, pointer, row, width, column):
    """pointer[row, column] in all lanes."""
    at = builder.add(builder.mul(row, _LONG(width)), _LONG(column))
    one = builder.insert_element(ir.Constant(_FLOATS, ir.Undefined), builder.load(builder.gep(pointer, [at])), _INT(0))
    return builder.shuffle_vector(one, ir.Constant(_FLOATS, ir.Undefined), ir.Constant(_INTS, [0] * LANES))


def _multiply_add(builder, a, b, c):
    return builder.fadd(builder.fmul(a, b, flags=("contract",)), c, flags=("contract",))


def _exp2(builder, x):
    """2**x for |x| < 126: of the integer nearest to x by its bits, of the rest by a polynomial."""
    shifted = builder.fadd(x, _all(ROUNDER))
    rest = builder.fsub(x, builder.fsub(shifted, _all(ROUNDER)))
    power = _all(EXP2[-1])
    for coefficient in EXP2[-2::-1]:
        power = _multiply_add(builder, power, rest, _all(coefficient))
    exponent = builder.shl(builder.bitcast(shifted, _INTS), ir.Constant(_INTS, [EXPONENT_BIT] * LANES))
    return builder.bitcast(builder.add(builder.bitcast(power, _INTS), exponent), _FLOATS)


_attend_entries = _attend()


@lru_cache(maxsize=8)
def read_kernel(key_width: int, value_width: int) -> Callable[..., None]:
    """`read_entries` of items by their queries in a table, for widths E and D; logits have to be within REACH_MAX."""

    def read_loop(query_MX, item_BC, key_HKE, mass_BHK, mean_BHKD, out_BCV):
        """Contiguous float32, items int64; all users' entries have the same keys.

        Masses but for a factor of each head: what has no positive mass is not there, and a head that has nothing gives
        zeros. Raises IndexError for an item that is not in the table.
        """
        heads, entries = mass_BHK.shape[1:]
        users, candidates = item_BC.shape
        items, row_bytes = query_MX.shape[0], 4 * query_MX.shape[1]
        query_XS = np.empty((heads * key_width, LANES), np.float32)
        out_VS = np.empty((heads * value_width, LANES), np.float32)
        moment_HKX = np.empty((heads, entries, value_width + 1), np.float32)
        query_address, key_address = query_XS.ctypes.data, key_HKE.ctypes.data
        moment_address, out_address = moment_HKX.ctypes.data, out_VS.ctypes.data
        for b in range(users):
            for c in range(candidates):
                if not 0 <= item_BC[b, c] < items:
                    raise IndexError("an item beyond the table of queries")
                for line in range(0, row_bytes, CACHE_LINE_BYTES):
                    prefetch(query_MX.ctypes.data + item_BC[b, c] * row_bytes + line)
            for h in range(heads):
                largest = np.float32(0.0)
                for k in range(entries):
                    largest = max(largest, mass_BHK[b, h, k])
                for k in range(entries):
                    share = max(mass_BHK[b, h, k], np.float32(0.0)) / largest if largest > 0 else np.float32(0.0)
                    for d in range(value_width):
                        moment_HKX[h, k, d] = share * mean_BHKD[b, h, k, d]
                    # A denominator for nothing.
                    moment_HKX[h, k, value_width] = share if largest > 0 else np.float32(1.0)
            for first in range(0, candidates, LANES):
                beside = min(LANES, candidates - first)
                for s in range(LANES):
                    item = item_BC[b, first + min(s, beside - 1)]
                    for x in range(heads * key_width):
                        query_XS[x, s] = query_MX[item, x] * LOG2_E
                for h in range(heads):
                    _attend_entries(
                        query_address + 4 * h * key_width * LANES,
                        key_address + 4 * h * entries * key_width,
                        moment_address + 4 * h * entries * (value_width + 1),
                        entries,
                        out_address + 4 * h * value_width * LANES,
                        key_width,
                        value_width,
                    )
                for s in range(beside):
                    for x in range(heads * value_width):
                        out_BCV[b, first + s, x] = out_VS[x, s]

    return numba.njit(cache=True, nogil=True, error_model="numpy")(unwrap(read_loop))


def _mass_loop(seen_BCV, mass_BHKR, age_ms_B, log_weight_HR, rate_HR, centre_H, scale_H, out_BCX):
    """`VqlHistory.with_mass` of `models.attention.log_mass_at`, from masses of these ages: out has V + H columns."""
    users, heads, codewords, rates = mass_BHKR.shape
    width = seen_BCV.shape[2]
    log_R = np.empty(rates)
    for b in range(users):
        out_BCX[b, :, :width] = seen_BCV[b]
        for h in range(heads):
            for r in range(rates):
                total = 0.0
                for k in range(codewords):
                    total += max(np.float64(mass_BHKR[b, h, k, r]), 0.0)
                log_R[r] = np.log(total) + log_weight_HR[h, r] - rate_HR[h, r] * age_ms_B[b] if total > 0 else -np.inf
            most = log_R.max()
            told = 0.0
            if most > -np.inf:
                log_mass = most + np.log(np.exp(log_R - most).sum())
                told = max(log_mass, 0.0) + np.log1p(np.exp(-abs(log_mass)))
            out_BCX[b, :, width + h] = (np.float32(told) - centre_H[h]) * scale_H[h]


mass_kernel = numba.njit(cache=True, nogil=True)(unwrap(_mass_loop))
