"""The checksum of a row's part (CRC-32C) for compiled code, which leaves the interpreter free meanwhile.

It is the function of google_crc32c's own library, and called without the interpreter. Where that library is not to be
found, compiled code calls the interpreter, and google_crc32c for Python: the same checksum, more slowly.
"""

from __future__ import annotations

import ctypes
from importlib import import_module

import google_crc32c
from llvmlite import binding
from numba import types

# The kernels kept on disk find it by this name, in each process anew.
_NAME = "vql_crc32c_extend"


def library_address() -> int | None:
    """Where google_crc32c's library has the function, None where it is not as we know it."""
    try:
        # What an extension is linked with is found through it.
        extend = ctypes.CDLL(import_module("google_crc32c._crc32c").__file__).crc32c_extend
    except (ImportError, OSError, AttributeError):
        return None
    return ctypes.cast(extend, ctypes.c_void_p).value


@ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)
def extend_by_interpreter(crc: int, address: int, size_bytes: int) -> int:
    return google_crc32c.extend(crc, ctypes.string_at(address, size_bytes))


def interpreter_address() -> int | None:
    """Where a function is that has the interpreter do it."""
    return ctypes.cast(extend_by_interpreter, ctypes.c_void_p).value


binding.add_symbol(_NAME, library_address() or interpreter_address())
# crc32c_extend(crc, address, size_bytes): the checksum of what crc is of, and of these bytes behind it
crc32c_extend = types.ExternalFunction(_NAME, types.uint32(types.uint32, types.int64, types.int64))
