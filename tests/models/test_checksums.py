"""The checksum for compiled code is that for Python, by the library and by the interpreter, in every process anew."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from threading import Thread

import google_crc32c
import numba
import numpy as np
import pytest

from models.checksums import crc32c_extend, interpreter_address, library_address

EXTEND = ctypes.CFUNCTYPE(ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p, ctypes.c_size_t)
# Statuses of a sound and of a damaged row, by kernels that lie on disk; how many were found there.
IN_A_PROCESS = """
import ctypes, sys, tempfile
from pathlib import Path
import llvmlite.binding, numba, torch
{hidden}
from models import checksums
from models.dense_caches import DenseBatch
from models.row import RowBytes, encode_row, new_row
from tests.small import small_checkpoint
with tempfile.TemporaryDirectory() as folder:
    fold = small_checkpoint(Path(folder) / "c").fold()
row = encode_row(new_row(fold.spec, 1, 2))
bad = RowBytes(folded=row.folded[:-1] + b"?", recent=row.recent)
batch = DenseBatch(2, fold, torch.device("cpu"))
batch.fill(0, [row, bad])
print(batch.place_B["status"].tolist())
print(checksums.library_address() is None, sum(batch._kernel.stats.cache_hits.values()))
"""
HIDDEN = """
def hidden(*_):
    raise OSError("no such library")
ctypes.CDLL = hidden
"""


@numba.njit(nogil=True)
def of(crc, address, size_bytes):
    return crc32c_extend(np.uint32(crc), address, size_bytes)


@pytest.mark.parametrize("address", [library_address, interpreter_address])
@pytest.mark.parametrize("size", [0, 1, 7, 100, 4_097, 50_000])
def test_it_is_that_of_python_in_one_go_and_by_halves(address, size):
    data, where = np.random.default_rng(size).bytes(size), address()
    if where is None:
        pytest.skip("google_crc32c has no library here")
    extend = EXTEND(where)
    assert extend(0, data, size) == google_crc32c.value(data)
    half = size // 2
    assert extend(extend(0, data[:half], half), data[half:], size - half) == google_crc32c.value(data)


def test_compiled_code_calls_it_from_threads_at_once():
    parts = [np.frombuffer(np.random.default_rng(n).bytes(10_000 + n), np.uint8) for n in range(50)]
    expected = [google_crc32c.value(part.tobytes()) for part in parts]
    found: list[list[int]] = []

    def check() -> None:
        found.append([of(0, part.ctypes.data, len(part)) for part in parts])

    threads = [Thread(target=check) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4


@pytest.mark.parametrize("hidden", ["", HIDDEN], ids=["library", "interpreter"])
def test_a_kernel_that_lies_on_disk_finds_it_in_another_process(hidden):
    script = IN_A_PROCESS.format(hidden=hidden)
    for _ in range(2):
        run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr
        statuses, found = run.stdout.splitlines()
        assert statuses == "[0, 1]"
    assert found == f"{bool(hidden) or library_address() is None} 1"
