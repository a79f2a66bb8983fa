"""The search finds an id in every format of file, and only where it stands by itself."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jobs.forget_scan import scan_file, scan_folder

LONG = "user-" + "x" * 60


def parquet(path: Path, values: list, kind: pa.DataType) -> Path:
    pq.write_table(pa.table({"n": [1] * len(values), "c": pa.array(values, kind)}), path, compression="zstd")
    return path


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["u12", None, "u1"], pa.string()),
        ([b"u12", b"u1"], pa.binary()),
        ([b'{"user_id":"u1","item_id":"i"}'], pa.binary()),
        (["of user u1, twice"], pa.large_string()),
        ([{"stats": '{"minValues":{"user_id":"u1"}}'}], pa.struct([("stats", pa.string())])),
        (["u1", "u1"], pa.dictionary(pa.int32(), pa.string())),
    ],
)
def test_in_parquet_by_columns(tmp_path: Path, values, kind) -> None:
    assert scan_file(parquet(tmp_path / "a.parquet", values, kind), "u1") == "the id in column c"
    assert scan_file(tmp_path / "a.parquet", "u3") is None


def test_another_users_event_is_not_taken_for_it(tmp_path: Path) -> None:
    values = [b'{"user_id":"u12","item_id":"u1"}', b"u12", b"u1-3-0"]
    assert scan_file(parquet(tmp_path / "a.parquet", values, pa.binary()), "u1") is None


@pytest.mark.parametrize(
    ("line", "held"),
    [
        ({"add": {"stats": json.dumps({"minValues": {"user_id": "42"}})}}, True),
        ({"add": {"stats": json.dumps({"minValues": {"offset": 42}})}}, False),
        ({"commitInfo": {"predicate": "[\"(user_id = '42')\"]"}}, True),
        ({"size": 42}, False),
    ],
)
@pytest.mark.parametrize("suffix", [".json", ".crc"])
def test_in_json_by_texts_and_not_by_numbers(tmp_path: Path, line, held, suffix) -> None:
    path = tmp_path / f"0{suffix}"
    path.write_text(f'{{"first": 1}}\n{json.dumps(line)}\n')
    assert scan_file(path, "42") == ("the id in line 2" if held else None)


def test_a_long_id_is_found_by_the_beginning_that_statistics_keep(tmp_path: Path) -> None:
    path = tmp_path / "0.json"
    path.write_text(json.dumps({"stats": json.dumps({"maxValues": {"user_id": LONG[:32] + "\u007f"}})}))
    assert scan_file(path, LONG) is not None
    assert scan_file(path, LONG[:20]) is None


def test_a_row_that_was_deleted_is_found_in_free_pages_and_after_secure_deletion_is_not(tmp_path: Path) -> None:
    for secure in ("OFF", "ON"):
        path = tmp_path / f"{secure}.db"
        with sqlite3.connect(path) as connection:
            connection.execute(f"PRAGMA secure_delete = {secure}")
            connection.execute("CREATE TABLE rows (user_id TEXT, checkpoint_id TEXT, n INTEGER)")
            connection.executemany(
                "INSERT INTO rows VALUES (?, ?, 5)", [(name, "0123456789abcdef" * 2) for name in ("u1", "u12")]
            )
            connection.commit()
            assert scan_file(path, "u1") is not None
            connection.execute("DELETE FROM rows WHERE user_id = 'u1'")
            connection.commit()
        connection.close()
        assert (scan_file(path, "u1") is None) == (secure == "ON")
        assert scan_file(path, "u12") is not None


def test_a_row_whose_next_number_is_like_a_digit_is_found_by_the_checkpoint_that_is_known(tmp_path: Path) -> None:
    (tmp_path / "a.db").write_bytes(b"\5u1" + b"0123456789abcdef" * 2 + b"7\0")
    assert scan_file(tmp_path / "a.db", "u1", ["0123456789abcdef" * 2]) is not None
    assert scan_file(tmp_path / "a.db", "u", ["0123456789abcdef" * 2]) is None


def test_other_bytes_are_searched_for_ids_that_chance_does_not_make(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "state.bin").write_bytes(b"\0\1longer-id\0 17 \xff")
    (tmp_path / "empty").touch()
    (found,) = scan_folder(tmp_path, "longer-id", "burn it")
    assert (found.where, found.remedy) == (str(tmp_path / "deep" / "state.bin"), "burn it")
    assert list(scan_folder(tmp_path, "17", "")) == []
