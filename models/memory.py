"""Little-endian numbers at addresses of memory, aligned or not, for compiled code that reads bytes where they lie.

Nothing is checked: who calls these has to know that the bytes are there, and stay there meanwhile.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Sequence
from inspect import unwrap
from typing import Any

import numpy as np
from jaxtyping import Int64
from llvmlite import ir
from numba import types
from numba.core.cgutils import get_or_insert_function, raw_memcpy
from numba.extending import intrinsic

assert sys.byteorder == "little", "rows are little-endian, and compiled code reads them as they are"


def addresses(parts: Sequence[bytes]) -> Int64[np.ndarray, "N"]:
    """Where each part's bytes begin; they stay there for as long as the part lives."""
    pointers = (ctypes.c_char_p * len(parts))(*parts)
    return np.frombuffer(memoryview(pointers), np.int64) if parts else np.empty(0, np.int64)


def _load(number: Any) -> Callable[[int], Any]:
    def typed(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], context.get_value_type(number).as_pointer())
            return builder.load(pointer, align=1)

        return number(types.int64), generate

    return intrinsic(unwrap(typed))


def _copy():
    def typed(typing_context, to, source, size_bytes):
        def generate(context, builder, signature, arguments):
            bytes_pointer = ir.IntType(8).as_pointer()
            to_pointer, from_pointer = (builder.inttoptr(each, bytes_pointer) for each in arguments[:2])
            raw_memcpy(builder, to_pointer, from_pointer, arguments[2], 1)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64, types.int64), generate

    return intrinsic(unwrap(typed))


def _prefetch():
    def typed(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
            number = ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [pointer.type, number, number, number])
            prefetch = get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
            # For reading, to be kept, data.
            builder.call(prefetch, [pointer, number(0), number(3), number(1)])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    return intrinsic(unwrap(typed))


def _load_shared():
    def typed(typing_context, address):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
            return builder.load_atomic(pointer, ordering="acquire", align=8)

        return types.int64(types.int64), generate

    return intrinsic(unwrap(typed))


def _store_shared():
    def typed(typing_context, address, value):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
            builder.store_atomic(arguments[1], pointer, ordering="release", align=8)
            return context.get_dummy_value()

        return types.void(types.int64, types.int64), generate

    return intrinsic(unwrap(typed))


def _swap_shared():
    def typed(typing_context, address, before, after):
        def generate(context, builder, signature, arguments):
            pointer = builder.inttoptr(arguments[0], ir.IntType(64).as_pointer())
            swapped = builder.cmpxchg(pointer, arguments[1], arguments[2], "acq_rel", "acquire")
            return builder.extract_value(swapped, 1)

        return types.boolean(types.int64, types.int64, types.int64), generate

    return intrinsic(unwrap(typed))


# copy(to, source, size_bytes); prefetch(address): it will be read soon, wherever it is
copy, prefetch = _copy(), _prefetch()
load_u8, load_u16, load_u32, load_u64 = (
    _load(each) for each in (types.uint8, types.uint16, types.uint32, types.uint64)
)
load_i64, load_f32 = _load(types.int64), _load(types.float32)
load_i32 = _load(types.int32)
# Of whole numbers (int64, aligned) that several threads use: what was written before a store_shared is seen by who
# has loaded its value. swap_shared(address, before, after): whether it was `before`, and is `after` now.
load_shared, store_shared, swap_shared = _load_shared(), _store_shared(), _swap_shared()
