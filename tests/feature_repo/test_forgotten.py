"""The list of the forgotten: read back, held to one key, and looked at by who runs on."""

from __future__ import annotations

from pathlib import Path

import pytest
from deltalake import DeltaTable

from feature_repo.forgotten import (
    LOOK_EVERY_S,
    ForgottenRef,
    WatchedForgotten,
    read_forgotten,
    write_done,
    write_requests,
)
from models.errors import InputError
from models.forgotten import Request

ONE, TWO = Request(1, 0, 5, 1_000), Request(1, 3, 7, 2_000)


@pytest.fixture
def ref(tmp_path: Path) -> ForgottenRef:
    (tmp_path / "key").write_bytes(b"k" * 32)
    return ForgottenRef(path=tmp_path / "forgotten", key_file=tmp_path / "key")


def test_requests_are_read_back_in_their_order_and_runs_are_no_requests(ref):
    assert not read_forgotten(ref)
    write_requests(ref, "a", [ONE], 1_000)
    write_requests(ref, "b", [ONE], 1_500)
    write_requests(ref, "a", [TWO], 2_000)
    write_done(ref, "a", TWO, {"events": 3}, 2_500)
    known = read_forgotten(ref)
    assert (known.of("a"), known.of("b"), known.of("c"), known.of("")) == ((ONE, TWO), (ONE,), (), ())


def test_the_audit_record_has_counts_and_no_id(ref):
    write_requests(ref, "who-it-was", [ONE], 1_000)
    write_done(ref, "who-it-was", ONE, {"events": 3}, 2_500)
    rows = DeltaTable(ref.path).to_pyarrow_table().to_pylist()
    (done,) = [row for row in rows if row["kind"] == "done"]
    assert (done["counts"], done["written_ms"], done["offset"]) == ('{"events":3}', 2_500, 5)
    assert done["user_hash"] == read_forgotten(ref).hash("who-it-was")
    assert "who-it-was" not in str(rows)


def test_another_key_or_none_is_refused_rather_than_finding_nobody(ref, tmp_path):
    assert not read_forgotten(ForgottenRef(path=ref.path, key_file=None))
    write_requests(ref, "a", [ONE], 1_000)
    (tmp_path / "other").write_bytes(b"o" * 32)
    with pytest.raises(InputError, match="another key"):
        read_forgotten(ForgottenRef(path=ref.path, key_file=tmp_path / "other"))
    with pytest.raises(InputError, match="is not set"):
        read_forgotten(ForgottenRef(path=ref.path, key_file=None))


def test_who_runs_on_sees_a_request_at_the_next_look_and_survives_a_list_that_is_unreadable(ref, caplog):
    now_s = 0.0
    watched = WatchedForgotten(ref, lambda: now_s)
    write_requests(ref, "a", [ONE], 1_000)
    assert watched.known.of("a") == ()
    now_s += LOOK_EVERY_S
    assert watched.known.of("a") == (ONE,)
    for file in ref.path.glob("*.parquet"):
        file.unlink()
    now_s += LOOK_EVERY_S
    assert watched.known.of("a") == (ONE,)
    assert "forgotten users is not looked at" in caplog.text
