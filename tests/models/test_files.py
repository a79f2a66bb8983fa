"""Files are whole or absent: after a kill, under readers, and on a disk that is really full."""

from __future__ import annotations

import errno
import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from models.errors import MachineError
from models.files import disk_error, replace_file, sha256_file

# A disk of 64 KB and 64 files, mounted for this one program: no other process sees it, and it ends with it.
MOUNT_REFUSED = 77
SMALL_DISK = f'mount -t tmpfs -o size=64k,nr_inodes=64 tmpfs "$1" || exit {MOUNT_REFUSED}; exec "$2" -c "$3" "$1"'


def on_a_small_disk(folder: Path, program: str) -> str:
    """What the program printed; its sys.argv[1] is that disk. Skips where no mount namespace can be had."""
    if shutil.which("unshare") is None or subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode:
        pytest.skip("a small disk needs Linux user namespaces (unshare -rm)")
    command = ["unshare", "-rm", "sh", "-c", SMALL_DISK, "sh", str(folder), sys.executable, program]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], timeout=120)
    if done.returncode == MOUNT_REFUSED:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    return done.stdout


def replace_for_ever(path: Path) -> None:
    for n in range(10**9):
        replace_file(path, bytes([n % 256]) * 1_000_000)


def test_a_file_is_replaced_and_its_folders_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file"
    replace_file(path, b"old")
    replace_file(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(path.parent.iterdir()) == [path]


def test_a_reader_and_a_restart_after_a_kill_see_a_whole_file(tmp_path):
    path = tmp_path / "file"
    replace_file(path, b"\0" * 1_000_000)
    writer = multiprocessing.get_context("spawn").Process(target=replace_for_ever, args=(path,))
    writer.start()
    deadline, seen = time.monotonic() + 60, set()
    while len(seen) < 20 and time.monotonic() < deadline:
        data = path.read_bytes()
        assert len(data) == 1_000_000
        assert data == data[:1] * 1_000_000
        seen.add(data[0])
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert len(seen) > 1
    data = path.read_bytes()
    assert data == data[:1] * 1_000_000


def test_what_a_killed_writer_left_does_not_stop_the_next_one(tmp_path):
    path = tmp_path / "file"
    (tmp_path / f".file.{os.getpid()}.{threading.get_native_id()}").write_bytes(b"a part")
    replace_file(path, b"whole")
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"file": b"whole"}


def test_a_failed_write_leaves_the_old_file_and_no_part(tmp_path):
    (tmp_path / "folder" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="folder"):
        replace_file(tmp_path / "folder", b"data")
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_a_machine_error_and_the_old_file_stays(tmp_path):
    program = """
import sys
from pathlib import Path
from models.errors import MachineError
from models.files import replace_file
path = Path(sys.argv[1]) / "file"
replace_file(path, b"old")
try:
    replace_file(path, b"x" * 1_000_000)
except MachineError as error:
    print(error.exit_code, error, sorted(p.name for p in path.parent.iterdir()), path.read_bytes())
"""
    printed = on_a_small_disk(tmp_path, program)
    assert printed.startswith(f"6 no space left to write {tmp_path}/file; free some")
    assert printed.endswith("['file'] b'old'\n")


def test_a_folder_that_cannot_be_made_on_a_full_disk_is_a_machine_error(tmp_path):
    program = """
import sys
from pathlib import Path
from models.errors import MachineError
from models.files import replace_file
root = Path(sys.argv[1])
# With the disk's own folder and this file, a folder and a file at a time: the 65th thing is a folder.
replace_file(root / "file", b"")
try:
    for n in range(100):
        replace_file(root / str(n) / "file", b"")
except MachineError as error:
    print("MachineError")
except OSError as error:
    print(repr(error))
"""
    assert on_a_small_disk(tmp_path, program) == "MachineError\n"


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_and_no_quota_say_the_same(number):
    error = disk_error(OSError(number, "full"), Path("there/file"))
    assert isinstance(error, MachineError)
    assert "there/file" in str(error)


def test_any_other_fault_of_the_disk_stays_itself():
    error = PermissionError(errno.EACCES, "no")
    assert disk_error(error, Path("x")) is error


def test_the_hash_is_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100_000)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"abc" * 100_000).hexdigest()
