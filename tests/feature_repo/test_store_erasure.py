"""How rows go, from every store: erased by user or checkpoint, expired, and counted no more."""

from __future__ import annotations

from feature_repo.store import Backfill
from tests.feature_repo.subjects import A, B, bytes_of, get, partial, stamp, whole


def test_a_deleted_user_is_gone_from_every_checkpoint_and_nobody_else_is(store):
    for checkpoint_id in (A, B):
        store.put_rows(checkpoint_id, [whole("u", stamp(1)), whole("v", stamp(1))])
    assert store.delete_user("u") == 2
    assert store.delete_user("u") == 0
    for checkpoint_id in (A, B):
        assert store.get_rows(checkpoint_id, ["u", "v"]) == [None, bytes_of(whole("v", stamp(1)))]


def test_a_row_is_deleted_only_as_it_was_seen(store):
    for checkpoint_id in (A, B):
        store.put_rows(checkpoint_id, [whole("u", stamp(1)), whole("v", stamp(1))])
    assert [store.delete_row(A, "u", other) for other in (stamp(2), stamp(1, revision=1), stamp(1, partition=1))] == [
        False,
        False,
        False,
    ]
    assert store.delete_row(A, "u", stamp(1)) is True
    assert store.delete_row(A, "u", stamp(1)) is False
    assert store.get_rows(A, ["u", "v"]) == [None, bytes_of(whole("v", stamp(1)))]
    assert (store.count_rows(A), store.count_rows(B)) == (1, 2)


def test_a_deleted_user_can_begin_again_at_any_stamp(store):
    store.put_rows(A, [whole("u", stamp(9))])
    store.delete_user("u")
    assert store.put_rows(A, [whole("u", stamp(1), follows=stamp(-1))]) == [True]


def test_an_expired_row_is_absent_for_readers_for_the_fence_and_for_the_count(subject):
    store = subject.open(ttl_s=2)
    store.put_rows(A, [whole("u", stamp(9)), whole("v", stamp(9))])
    subject.wait(1.0)
    assert (get(store, "u"), store.count_rows(A)) == (bytes_of(whole("u", stamp(9))), 2)
    subject.wait(1.5)
    assert (get(store, "u"), store.count_rows(A)) == (None, 0)
    assert store.get_stamps(A, ["u", "v"]) == [None, None]
    for put in (partial, whole):
        assert store.put_rows(A, [put("u", stamp(10), follows=stamp(9))]) == [False]
    assert store.put_rows(A, [whole("u", stamp(1), follows=stamp(-1)), whole("v", stamp(1))]) == [True, True]
    assert get(store, "u") == bytes_of(whole("u", stamp(1)))
    assert store.count_rows(A) == 2


def test_every_write_starts_the_time_to_live_again(subject):
    store = subject.open(ttl_s=2)
    store.put_rows(A, [whole("u", stamp(1))])
    subject.wait(1.5)
    store.put_rows(A, [partial("u", stamp(2), follows=stamp(1))])
    subject.wait(1.5)
    assert (get(store, "u") is not None, store.count_rows(A)) == (True, 1)


def test_rows_are_counted_once_and_no_more_when_they_are_erased(store):
    assert store.count_rows(A) == 0
    store.put_rows(A, [whole(f"u{n}", stamp(1)) for n in range(300)])
    store.put_rows(A, [partial(f"u{n}", stamp(2), follows=stamp(1)) for n in range(300)])
    store.put_rows(B, [whole("u0", stamp(1))])
    store.delete_user("u0")
    assert (store.count_rows(A), store.count_rows(B)) == (299, 0)


def test_without_a_time_to_live_rows_stay(subject):
    store = subject.open()
    store.put_rows(A, [whole("u", stamp(1))])
    subject.wait(3)
    assert get(store, "u") is not None


def test_a_deleted_checkpoint_takes_its_rows_positions_and_record_and_no_other(store):
    record = Backfill(epoch=0, cut={0: 1}, users=1, events=1, log="l")
    for checkpoint_id in (A, B):
        store.put_rows(checkpoint_id, [whole(f"u{n}", stamp(1)) for n in range(700)])
        store.commit_positions(checkpoint_id, 0, {0: 1})
        store.record_backfill(checkpoint_id, record)
    assert store.delete_checkpoint(A) == 700
    assert (get(store, "u3", A), store.count_rows(A), store.positions(A), store.backfill(A)) == (None, 0, {}, None)
    assert (get(store, "u3", B) is not None, store.count_rows(B)) == (True, 700)
    assert (store.positions(B), store.backfill(B)) == ({0: (0, 1)}, record)
    assert store.delete_checkpoint(A) == 0


def test_a_removed_store_is_empty_and_can_be_begun_again(store):
    store.put_rows(A, [whole("u", stamp(9))])
    store.commit_positions(A, 0, {0: 9})
    store.remove()
    assert (get(store, "u"), store.count_rows(A), store.positions(A)) == (None, 0, {})
    assert store.put_rows(A, [whole("u", stamp(1))]) == [True]
