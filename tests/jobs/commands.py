"""What a command of `vql` said, and the one line that an error is to be."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class Said:
    code: int
    out: str
    err: str


def assert_one_line(said: Said, code: int, *words: str) -> None:
    assert said.code == code, said
    assert said.err.count("\n") == 1, said.err
    assert said.err.startswith("vql: ")
    assert "Traceback" not in said.err
    for word in words:
        assert word in said.err
