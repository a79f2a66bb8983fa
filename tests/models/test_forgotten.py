"""Who is forgotten is known by a keyed hash and a position, and found in records whatever their bytes are."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from models.forgotten import Forgotten, Request, mentions, stands_in, users_of
from models.user_hash import hashed_user

KEY = bytes(range(40))


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    (tmp_path / "key").write_bytes(KEY)
    return tmp_path / "key"


def forgotten(key_file: Path, user_id: str, *requests: Request) -> Forgotten:
    return Forgotten(key_file=key_file, requests={Forgotten(key_file=key_file).hash(user_id): requests})


def test_the_hash_is_keyed_and_the_key_stays_in_its_file(key_file):
    known = forgotten(key_file, "ü", Request(1, 0, 5, 9))
    assert list(known.requests) == [hashed_user("ü", KEY)]
    pickled = pickle.dumps(known)
    assert KEY not in pickled
    assert pickle.loads(pickled).of("ü") == (Request(1, 0, 5, 9),)
    assert known.of("u") == ()


@pytest.mark.parametrize(
    ("place", "covered"),
    [((2, 1, 7), True), ((2, 1, 8), False), ((2, 0, 3), False), ((1, 0, 99), True), ((3, 1, 0), False)],
)
def test_what_is_at_or_below_the_position_is_covered_and_nothing_later(key_file, place, covered):
    known = forgotten(key_file, "u", Request(2, 1, 7, 9))
    assert known.of("u")[0].covers(*place) is covered
    epoch, partition, offset = place
    found_N = known.covered_N(["v", "u", None], epoch, np.full(3, partition), np.full(3, offset))
    assert found_N.tolist() == [False, covered, False]
    wanted = 7 if (epoch, partition) == (2, 1) else -1
    assert (known.offset("u", epoch, partition), known.offset("v", epoch, partition)) == (wanted, -1)


def test_of_files_the_time_of_the_newest_request_decides(key_file):
    known = forgotten(key_file, "u", Request(1, 0, 5, 1_000), Request(1, 0, 9, 2_000))
    times = np.array([1_500, 2_000, 2_001, 0, 0])
    assert known.before_N(["u", "u", "u", "u", "v"], times).tolist() == [True, True, False, True, False]
    assert Forgotten(key_file=key_file).before_N(["u"], times[:1]).tolist() == [False]


def test_an_id_is_found_as_a_word_in_each_spelling_of_json():
    name = 'ü"ser/7'
    for text in (json.dumps(name), json.dumps(name, ensure_ascii=False), name):
        assert stands_in(name, b"before " + text.encode() + b" after")
    assert not stands_in("u1", b"u12 xu1 u1-3 _u1")


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        (b"u1", None, True),
        (b"u2", b'{"user_id": "u1"}', True),
        (b"u2", b'{"user_id": "u2", "item_id": "u1"}', False),
        (b"u2", b'{"uid": "u1"}', True),
        (b"u2", b"\xff broken u1", True),
        (b"u2", b"\xff broken u12", False),
        (None, b'{"user_id": "u1", "item_id": 7}', True),
    ],
)
def test_a_record_is_of_the_user_it_names_or_of_one_whose_id_stands_in_it(key, value, named):
    assert mentions("u1", key, value) is named


def test_a_record_names_its_key_and_its_own_user():
    assert users_of(b"a", b'{"user_id": "b"}') == ["a", "b"]
    assert users_of(b"a", b"nonsense") == ["a"]
    assert users_of(None, None) == []
