from __future__ import annotations

import io

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from jobs.printable import escaped, plain, printable, time_words


@given(st.binary(max_size=200))
def test_whatever_the_bytes_nothing_can_steer_a_terminal(data: bytes) -> None:
    assert printable(data, 1000).isprintable()


@given(st.text())
def test_printable_letters_stay_as_they_are(text: str) -> None:
    assert escaped(text) == text or not text.isprintable()


@pytest.mark.parametrize("text", ["\x1b]0;title\x07", "\u202egnp.exe", "a\nb", "\ud800", "\x9b2J"])
def test_what_moves_a_cursor_or_turns_the_text_is_escaped(text: str) -> None:
    assert escaped(text).isprintable()
    assert "\\" in escaped(text)


def test_markup_of_the_console_is_shown_as_it_is() -> None:
    console = Console(file=io.StringIO(), force_terminal=False)
    console.print(plain("[red]not red[/red]"))
    assert console.file.getvalue() == "[red]not red[/red]\n"


def test_a_long_original_says_what_is_missing() -> None:
    assert printable(b"x" * 12, 10) == "xxxxxxxxxx ... (2 more bytes)"


@pytest.mark.parametrize("time_ms", [-1, -(2**63), 2**63 - 1])
def test_a_time_that_is_none_is_unknown(time_ms: int) -> None:
    assert time_words(time_ms) == "unknown"
