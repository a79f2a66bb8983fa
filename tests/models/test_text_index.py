"""Texts found from Arrow's bytes are those that a dict finds."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from models.text_index import TextIndex

OTHERWISE = -7
# Of few letters, so that texts are alike, equal, and beginnings of one another; longer and shorter than a word.
TEXT = st.one_of(st.text("ab", max_size=20), st.text(max_size=6))


@settings(deadline=None)  # the first example compiles
@given(st.lists(TEXT, unique=True, max_size=60), st.lists(st.one_of(st.none(), TEXT), max_size=60), st.data())
def test_finds_what_a_dict_finds(known, asked, data):
    index = {text: 3 * place for place, text in enumerate(known)}
    asked = asked + [data.draw(st.sampled_from(known)) for _ in range(5) if known]
    start = data.draw(st.integers(0, len(asked)))
    text_N = pa.array(asked, pa.string()).slice(start)
    found_N = TextIndex(index).find(text_N, OTHERWISE)
    assert found_N.dtype == np.int64
    assert found_N.tolist() == [index.get(text, OTHERWISE) for text in asked[start:]]


def test_many_texts_that_differ_in_a_digit_are_told_apart():
    names = [f"item-{n}" for n in range(30_000)]
    found_N = TextIndex({name: n for n, name in enumerate(names)}).find(pa.array([*names, "item-30000"]), OTHERWISE)
    assert found_N.tolist() == [*range(30_000), OTHERWISE]


def test_texts_of_zero_bytes_and_of_none_differ():
    assert TextIndex({"": 1, "\0": 2, "\0\0": 3}).find(pa.array(["\0\0", "", "\0", None]), OTHERWISE).tolist() == [
        *(3, 1, 2),
        OTHERWISE,
    ]
