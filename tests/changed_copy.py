"""A copy of packages with one change of text, by which a rule is switched off: what a test would miss without it."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def changed_copy(folder: Path, packages: Sequence[str], file: str, text: str, off: str) -> Path:
    """These packages with one change. Their compiled files go with them: what is not changed need not be compiled."""
    for package in packages:
        shutil.copytree(REPOSITORY / package, folder / package)
    changed = folder / file
    source = changed.read_text()
    assert source.count(text) == 1, f"{file} has {text!r} {source.count(text)} times"
    changed.write_text(source.replace(text, off))
    return folder
