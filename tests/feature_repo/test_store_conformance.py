"""What every fenced store must do, one writer at a time. A further store is one more entry of `subjects.SUBJECTS`."""

from __future__ import annotations

import os
import pickle
import random

import pytest

from feature_repo.store import Backfill, RowPut, run_out
from models.errors import InputError
from models.row import RowBytes
from tests.feature_repo.subjects import A, B, bytes_of, get, partial, stamp, whole

HOSTILE = ["nul\0inside", "\0", "line\nbreak", "quo'te\"s", "glob*?[a]", "100%_", "é", "🙂", "x" * 4096, "u", "U", "u "]
HOSTILE += ["{", "}", "{}", "}{0}", ":", "a:b", " ", "\r\n$-1\r\n", "u\ufeff", "-1"]


def test_a_new_row_comes_back_as_it_was_put(store):
    put = whole("u", stamp(3))
    assert store.put_rows(A, [put]) == [True]
    assert get(store, "u") == bytes_of(put)


@pytest.mark.parametrize(
    ("older", "newer"),
    [
        (stamp(9), stamp(10)),
        (stamp(9), stamp(9, revision=1)),
        (stamp(2**40, revision=5), stamp(0, epoch=1)),
        (stamp(-1), stamp(0)),
        (stamp(2**47 - 1, epoch=2**32 - 2), stamp(0, epoch=2**32 - 1)),
    ],
)
def test_newer_replaces_older_and_never_the_other_way(store, older, newer):
    assert store.put_rows(A, [whole("u", older)]) == [True]
    assert store.put_rows(A, [whole("u", newer)]) == [True]
    assert store.put_rows(A, [whole("u", older)]) == [False]
    assert get(store, "u") == bytes_of(whole("u", newer))


@pytest.mark.parametrize("count", [0, 1, 50, 60, 1_010])
def test_rows_come_in_parts_as_well_whatever_their_number(store, count):
    users = [f"u{n}" for n in range(count)]
    store.put_rows(A, [whole(user_id, stamp(n)) for n, user_id in enumerate(users[::2])])
    taken: list[RowBytes | None] = []

    def take(first, part):
        assert first == len(taken)
        taken.extend(part)

    run_out(store.reading(A, users, take))
    rows = store.get_rows(A, users)
    assert [row is not None for row in rows] == [n % 2 == 0 for n in range(count)]
    assert taken == rows


def test_an_equal_stamp_changes_nothing(store):
    first = whole("u", stamp(3))
    store.put_rows(A, [first])
    other = RowPut(user_id="u", stamp=stamp(3), recent=b"other", folded=b"other")
    assert store.put_rows(A, [other]) == [False]
    assert get(store, "u") == bytes_of(first)


def test_a_refused_put_does_not_hold_back_the_others_of_its_batch(store):
    store.put_rows(A, [whole("old", stamp(9))])
    batch = [whole("new", stamp(1)), whole("old", stamp(5)), whole("newer", stamp(2)), whole("new", stamp(1))]
    assert store.put_rows(A, batch) == [True, False, True, False]
    assert get(store, "old") == bytes_of(whole("old", stamp(9)))
    assert get(store, "newer") == bytes_of(whole("newer", stamp(2)))


def test_the_first_log_of_an_epoch_is_the_one_that_stays(store):
    assert store.bind_log(A, 1, "topic one") == "topic one"
    assert store.bind_log(A, 1, "topic two") == "topic one"
    assert store.bind_log(A, 2, "topic two") == "topic two"
    assert store.bind_log(B, 1, "topic two") == "topic two"
    store.delete_checkpoint(A)
    assert store.bind_log(A, 1, "topic three") == "topic three"
    assert store.bind_log(B, 1, "topic three") == "topic two"


def test_an_empty_batch_is_no_work(store):
    assert store.put_rows(A, []) == []
    assert store.get_rows(A, []) == []


def test_a_partial_put_keeps_the_folded_part(store):
    first = whole("u", stamp(5))
    store.put_rows(A, [first])
    assert store.put_rows(A, [partial("u", stamp(6), follows=stamp(5))]) == [True]
    assert get(store, "u") == RowBytes(folded=first.folded, recent=b"new")
    assert store.put_rows(A, [whole("u", stamp(7), follows=stamp(6))]) == [True]
    assert get(store, "u") == bytes_of(whole("u", stamp(7)))


def test_half_a_row_that_follows_none_cannot_be_made():
    with pytest.raises(AssertionError, match="follows none"):
        RowPut(user_id="u", stamp=stamp(6), recent=b"new", folded=None)


OTHER_ROWS = [stamp(1), stamp(3), stamp(2, epoch=1), stamp(2, revision=1), stamp(2, partition=1), stamp(-1)]


@pytest.mark.parametrize("put", [partial, whole])
@pytest.mark.parametrize("follows", OTHER_ROWS)
def test_a_put_is_refused_unless_the_stored_row_is_the_one_it_follows(store, put, follows):
    first = whole("u", stamp(2))
    store.put_rows(A, [first])
    assert store.put_rows(A, [put("u", stamp(9, epoch=2), follows=follows)]) == [False]
    assert get(store, "u") == bytes_of(first)


@pytest.mark.parametrize("put", [partial, whole])
def test_a_put_that_follows_the_stored_row_must_still_be_newer(store, put):
    first = whole("u", stamp(5))
    store.put_rows(A, [first])
    for at in (stamp(5), stamp(4), stamp(5, partition=1)):
        assert store.put_rows(A, [put("u", at, follows=stamp(5))]) == [False]
    assert get(store, "u") == bytes_of(first)


def test_a_row_that_follows_none_is_new_only_once(store):
    assert store.put_rows(A, [whole("u", stamp(6), follows=stamp(-1))]) == [True]
    assert store.put_rows(A, [whole("u", stamp(7), follows=stamp(-1))]) == [False]
    assert get(store, "u") == bytes_of(whole("u", stamp(6)))


def test_a_row_that_appeared_since_is_not_overwritten_by_a_writer_that_saw_none(store):
    assert get(store, "u") is None
    backfilled = whole("u", stamp(5))
    store.put_rows(A, [backfilled])
    assert store.put_rows(A, [whole("u", stamp(9), follows=stamp(-1))]) == [False]
    assert get(store, "u") == bytes_of(backfilled)


@pytest.mark.parametrize("put", [partial, whole])
def test_a_row_repaired_since_is_not_continued_from_its_old_state(store, put):
    repaired = whole("u", stamp(5, revision=1))
    assert store.put_rows(A, [whole("u", stamp(5)), repaired]) == [True, True]
    assert store.put_rows(A, [put("u", stamp(6), follows=stamp(5))]) == [False]
    assert get(store, "u") == bytes_of(repaired)
    assert store.put_rows(A, [put("u", stamp(6, revision=1), follows=repaired.stamp)]) == [True]


@pytest.mark.parametrize("put", [partial, whole])
def test_a_row_erased_since_does_not_come_back(store, put):
    store.put_rows(A, [whole("u", stamp(5))])
    store.delete_user("u")
    assert store.put_rows(A, [put("u", stamp(6), follows=stamp(5))]) == [False]
    assert get(store, "u") is None


def test_half_a_row_cannot_be_the_first(store):
    assert store.put_rows(A, [partial("u", stamp(6), follows=stamp(-1))]) == [False]
    assert get(store, "u") is None


def test_puts_of_one_user_in_one_batch_follow_each_other(store):
    batch = [whole("u", stamp(1), follows=stamp(-1)), *(partial("u", stamp(n + 1), follows=stamp(n)) for n in (1, 2))]
    assert store.put_rows(A, batch) == [True, True, True]


def test_checkpoints_do_not_see_each_other(store):
    store.put_rows(A, [whole("u", stamp(9))])
    assert get(store, "u", B) is None
    assert store.put_rows(B, [whole("u", stamp(1))]) == [True]
    assert get(store, "u", A) == bytes_of(whole("u", stamp(9)))


def test_a_thousand_users_come_back_in_the_order_asked_for_absent_ones_too(store):
    puts = [whole(f"u{n}", stamp(n)) for n in range(1000)]
    assert store.put_rows(A, puts) == [True] * 1000
    order = list(range(1200))
    random.Random(1).shuffle(order)
    rows = store.get_rows(A, [f"u{n}" for n in order])
    assert rows == [bytes_of(puts[n]) if n < 1000 else None for n in order]


def test_a_user_asked_for_twice_is_answered_twice(store):
    store.put_rows(A, [whole("u", stamp(1))])
    row = bytes_of(whole("u", stamp(1)))
    assert store.get_rows(A, ["u", "v", "u"]) == [row, None, row]


def test_stamps_are_those_of_the_rows(store):
    stamps = {"u": stamp(2**40, epoch=3, revision=7, partition=11), "new": stamp(-1), "x" * 600: stamp(5)}
    store.put_rows(A, [whole(user_id, at) for user_id, at in stamps.items()])
    store.put_rows(A, [partial("new", stamp(0), follows=stamp(-1))])
    stamps["new"] = stamp(0)
    asked = ["nobody", *stamps, "u", *HOSTILE]
    assert store.get_stamps(A, asked) == [stamps.get(user_id) for user_id in asked]
    assert store.get_stamps(B, ["u"]) == [None]
    assert store.get_stamps(A, []) == []


def test_hostile_user_ids_are_only_ids(store):
    for n, user_id in enumerate(HOSTILE):
        assert store.put_rows(A, [whole(user_id, stamp(n))]) == [True], user_id
    expected = [bytes_of(whole(user_id, stamp(n))) for n, user_id in enumerate(HOSTILE)]
    assert store.get_rows(A, HOSTILE) == expected
    assert store.get_stamps(A, HOSTILE) == [stamp(n) for n in range(len(HOSTILE))]
    assert store.delete_user("glob*?[a]") == 1
    assert store.get_rows(A, HOSTILE) == [
        None if u == "glob*?[a]" else e for u, e in zip(HOSTILE, expected, strict=True)
    ]


def test_positions_only_rise(store):
    assert store.positions(A) == {}
    store.commit_positions(A, 0, {0: 5, 3: 2**40})
    store.commit_positions(A, 0, {0: 4, 3: 2**40 + 1})
    assert store.positions(A) == {0: (0, 5), 3: (0, 2**40 + 1)}
    store.commit_positions(A, 1, {0: 1})
    store.commit_positions(A, 0, {0: 100, 7: 0})
    assert store.positions(A) == {0: (1, 1), 3: (0, 2**40 + 1), 7: (0, 0)}
    store.commit_positions(A, 1, {})
    assert store.positions(B) == {}


def test_the_backfill_record_comes_back_and_the_last_one_counts(store):
    assert store.backfill(A) is None
    first = Backfill(epoch=2, cut={0: 41, 11: 2**40}, users=3, events=7, log="kafka:events")
    second = Backfill(epoch=2, cut={}, users=0, events=0, log="delta")
    store.record_backfill(A, first)
    assert store.backfill(A) == first
    store.record_backfill(A, second)
    assert store.backfill(A) == second
    assert store.backfill(B) is None


def test_a_second_opening_sees_everything(subject):
    first, second = subject.open(), subject.open()
    first.put_rows(A, [whole("u", stamp(1))])
    first.commit_positions(A, 0, {0: 1})
    assert get(second, "u") == bytes_of(whole("u", stamp(1)))
    assert second.positions(A) == {0: (0, 1)}


def test_a_closed_store_opens_again_at_the_next_call(store):
    store.put_rows(A, [whole("u", stamp(1))])
    store.close()
    store.close()
    assert get(store, "u") == bytes_of(whole("u", stamp(1)))


def test_a_pickled_copy_is_the_same_store(store):
    store.put_rows(A, [whole("u", stamp(1))])
    copy = pickle.loads(pickle.dumps(store))
    assert get(copy, "u") == bytes_of(whole("u", stamp(1)))
    assert copy.put_rows(A, [whole("u", stamp(2))]) == [True]


def test_a_forked_child_and_its_parent_both_go_on(store):
    store.put_rows(A, [whole("parent", stamp(1))])
    child = os.fork()
    if child == 0:
        ok = store.put_rows(A, [whole("child", stamp(1))])[0] and get(store, "parent") is not None
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert store.put_rows(A, [whole("parent", stamp(2))]) == [True]
    wanted = [whole("parent", stamp(2)), whole("child", stamp(1))]
    assert store.get_rows(A, ["parent", "child"]) == [bytes_of(put) for put in wanted]


def test_an_id_that_is_not_unicode_text_is_the_callers_fault(store):
    with pytest.raises(InputError, match="not Unicode text"):
        store.get_rows(A, ["u", "\ud800"])
    with pytest.raises(InputError, match="not Unicode text"):
        store.put_rows(A, [whole("\ud800", stamp(1))])
    assert get(store, "u") is None
