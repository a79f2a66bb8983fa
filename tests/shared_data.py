"""Data that is not the project's: looked for in the folder VQL_SHARED_DATA, else in shared/data in or beside the
repository. A test that wants a file of it is skipped where it is not there.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]


def shared_file(name: str) -> Path:
    """Skips the test where the file is not there."""
    told = os.environ.get("VQL_SHARED_DATA")
    folders = [Path(told)] if told else [REPOSITORY / "shared" / "data", REPOSITORY.parent / "shared" / "data"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is not in {' or '.join(map(str, folders))}: this test is over its real events")
