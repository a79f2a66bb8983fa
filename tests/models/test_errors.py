"""The page of errors: its tree names every class, its place and its exit code, and says nothing else."""

from __future__ import annotations

import inspect
import re

import models.errors
from models.errors import EventError, VqlError

LINE = re.compile(r"^(?P<branch>[ |`]*-- )?(?P<name>\w+Error)\s+(\((?P<code>\d)\))?", re.MULTILINE)


def documented() -> dict[str, tuple[str, int | None]]:
    """Class -> (its parent in the drawing, its exit code)."""
    tree: dict[str, tuple[str, int | None]] = {}
    path: list[str] = []
    for line in inspect.getdoc(models.errors).splitlines():
        found = LINE.match(line)
        if found:
            depth = len(found["branch"] or "") // 4
            path[depth:] = [found["name"]]
            tree[found["name"]] = (
                path[depth - 1] if depth else "Exception",
                int(found["code"]) if found["code"] else 1,
            )
    return tree


def defined() -> dict[str, tuple[str, int]]:
    classes = inspect.getmembers(models.errors, inspect.isclass)
    return {name: (kind.__mro__[1].__name__, kind.exit_code) for name, kind in classes}


def test_the_drawn_tree_is_the_tree_of_classes_with_their_exit_codes():
    assert documented() == defined()
    assert len(defined()) == 12


def test_every_error_is_a_vql_error_with_a_sentence_and_an_exit_code():
    for _, kind in inspect.getmembers(models.errors, inspect.isclass):
        assert issubclass(kind, VqlError)
        # 7 and 9 are findings of commands that worked: letters left out, reads that disagree.
        assert kind.exit_code in {1, 2, 3, 4, 5, 6, 8}
        assert kind.__doc__


def test_an_event_error_carries_its_reason_and_says_both():
    error = EventError("weight", "weight 0 is no number")
    assert (error.reason, error.detail, str(error)) == (
        "weight",
        "weight 0 is no number",
        "weight: weight 0 is no number",
    )
