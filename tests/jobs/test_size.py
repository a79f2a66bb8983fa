"""`vql size`: its figures are those of rows that real stores keep, and of the memory that a real server takes."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from feature_repo.redis_settings import RedisSettings
from feature_repo.redis_store import RedisRows
from feature_repo.sqlite_store import SqliteRows
from feature_repo.store import RowStore, whole_put
from jobs.bench_load import random_checkpoint, random_history
from jobs.datasets.completejourney import data_file
from jobs.size import END_MS, LENGTH_SPREAD, SizePlan, histories, mix_lengths, with_half_means
from jobs.size_redis import computed_bytes, measured_bytes
from models.checkpoint import Checkpoint, Sizes
from models.row import Row, encode_row
from tests.jobs.commands import assert_one_line
from tests.redis_server import running_redis
from tests.small import small_checkpoint, write_items

HEADER, SECTION, CHECKSUM, RECORD = 64, 16, 4, 24
LENGTHS = (1, 40, 300)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return small_checkpoint(tmp_path / "checkpoint", rates=2)


def rows_of(checkpoint: Checkpoint, length: int, count: int) -> list[Row]:
    return histories(checkpoint, checkpoint.fold(), [length] * count)


def kept(store: RowStore, checkpoint: Checkpoint, rows: list[Row]) -> float:
    """Mean bytes of the rows as the store gives them back."""
    users = [f"u{n}" for n in range(len(rows))]
    put = [whole_put(user_id, row) for user_id, row in zip(users, rows, strict=True)]
    assert all(store.put_rows(checkpoint.checkpoint_id, put))
    found = store.get_rows(checkpoint.checkpoint_id, users)
    return float(np.mean([len(row.folded) + len(row.recent) for row in found if row is not None]))


def test_the_figures_are_the_sizes_of_rows_that_the_stores_keep(vql, checkpoint: Checkpoint, tmp_path: Path) -> None:
    output = tmp_path / "made" / "size.json"
    with running_redis(tmp_path) as server:
        lengths = ",".join(map(str, LENGTHS))
        said = vql(
            *("size", "--checkpoint", checkpoint.path, "--lengths", lengths, "--mean-length", "50"),
            *("--users", "1000000,3000000", "--output", output),
        )
        assert said.code == 0, said.err
        figures = json.loads(output.read_text())
        rows_each = figures["config"]["rows_each"]
        for length in LENGTHS:
            rows, size = rows_of(checkpoint, length, rows_each), figures["lengths"][str(length)]
            stores = [SqliteRows(tmp_path / f"{length}.db", None), RedisRows(RedisSettings(url=server.url))]
            for store in stores:
                assert kept(store, checkpoint, rows) == pytest.approx(size["fp32"]["row_bytes"], rel=1e-12)
                store.remove()
                store.close()
            assert size["folded_bytes"] + size["recent_bytes"] == pytest.approx(size["fp32"]["row_bytes"])
            assert (size["events"], size["raw_bytes"]) == (length, RECORD * length)
    assert figures["redis"] == "measured"
    assert "redis-server" in figures["versions"]
    assert figures["checkpoint"] == checkpoint.checkpoint_id
    assert figures["mix"]["events"] == pytest.approx(50, rel=0.02)
    for users in (1_000_000, 3_000_000):
        for kind in ("fp32", "fp16"):
            total = users * figures["mix"][kind]["redis_bytes"] / 2**30
            assert figures["redis_gib"][str(users)][kind] == pytest.approx(total)
    assert "300" in said.out
    assert f"{figures['redis_gib']['3000000']['fp32']:,.1f}" in said.out


def test_longer_histories_take_more_up_to_a_full_table_and_half_means_less(tmp_path: Path) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint", Sizes(codewords=32, window=4))
    codes, before = 4 * 32, (0, 0)
    for length in (1, 10, 100, 1_000, 10_000):
        (row,) = rows_of(checkpoint, length, 1)
        now = (len(row.folded.code_N), row.size_bytes)
        assert now >= before
        before = now
        half = with_half_means(row).size_bytes
        assert half < encode_row(row).size_bytes if length >= 10 else half == encode_row(row).size_bytes
    assert before[0] == codes


def test_bytes_are_what_the_format_says_of_the_codewords_that_the_events_have(checkpoint: Checkpoint) -> None:
    (row,) = rows_of(checkpoint, 30, 1)
    data, half = encode_row(row), with_half_means(row)
    table = checkpoint.fold().table
    events = random_history(np.random.default_rng(0), 30, END_MS, len(table) - 1, len(checkpoint.manifest.actions))
    # With W = 4 the last 6 of 30 events stay raw.
    assert row.recent_data == events[24:].tobytes()
    assert len(data.recent) == len(half.recent) == HEADER + SECTION + 6 * RECORD + CHECKSUM
    per_group, rates, width = 2, 2, 3
    entries = sum(len(np.unique(code_M)) for code_M in table.code_MG[events["item"][:24]].T)
    assert len(row.folded.code_N) == entries
    pairs = entries * per_group * rates
    assert len(data.folded) == HEADER + 4 * SECTION + CHECKSUM + entries * (2 + 4) + pairs * (4 + 4 * width)
    assert len(half.folded) == HEADER + 4 * SECTION + CHECKSUM + entries * (2 + 4) + pairs * (4 + 2 * width)


def test_what_is_measured_on_a_thousand_users_holds_for_many(tmp_path: Path) -> None:
    checkpoint, users = random_checkpoint(tmp_path / "checkpoint", Sizes()), 20_000
    (row,) = rows_of(checkpoint, 1, 1)
    with running_redis(tmp_path) as server, server.client() as client:
        store = RedisRows(RedisSettings(url=server.url))
        before = client.info("memory")["used_memory"]
        # As long as the ids that are sized.
        store.put_rows(checkpoint.checkpoint_id, [whole_put(f"somebody-{n:07d}", row) for n in range(users)])
        store.close()
        while client.info("clients")["connected_clients"] > 1:
            time.sleep(0.01)
        many = (client.info("memory")["used_memory"] - before) / users
    assert measured_bytes(checkpoint.checkpoint_id, [encode_row(row)]) == pytest.approx(many, rel=0.03)


@pytest.mark.parametrize("length", [1, 10, 100, 150, 1_000])
def test_what_is_computed_is_what_a_server_takes(tmp_path: Path, length: int) -> None:
    checkpoint = random_checkpoint(tmp_path / "checkpoint", Sizes())
    with running_redis(tmp_path):
        rows = [encode_row(row) for row in rows_of(checkpoint, length, 2)]
        assert computed_bytes(rows) == pytest.approx(measured_bytes(checkpoint.checkpoint_id, rows), rel=0.02)


def test_without_redis_the_memory_is_computed(
    vql, checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("jobs.size_redis.shutil.which", lambda name: None)
    output = tmp_path / "size.json"
    said = vql("size", "--checkpoint", checkpoint.path, "--lengths", "9", "--users", "5", "--output", output)
    assert said.code == 0, said.err
    figures = json.loads(output.read_text())
    rows = [encode_row(row) for row in rows_of(checkpoint, 9, figures["config"]["rows_each"])]
    assert figures["redis"] == "computed"
    assert figures["lengths"]["9"]["fp32"]["redis_bytes"] == computed_bytes(rows)


def test_a_mix_has_the_mean_that_was_asked_for_and_the_spread_of_a_real_log() -> None:
    lengths = mix_lengths(500.0, SizePlan().mix_rows)
    assert np.mean(lengths) == pytest.approx(500, rel=0.002)
    assert np.std(np.log(lengths)) == pytest.approx(LENGTH_SPREAD, rel=0.03)
    assert min(lengths) >= 1
    assert min(mix_lengths(2.0, 1_000)) == 1
    household_N = pq.read_table(data_file("transactions"), columns=["household_id"])["household_id"].to_numpy()
    real_U = np.unique(household_N, return_counts=True)[1]
    assert np.std(np.log(real_U)) == pytest.approx(LENGTH_SPREAD, abs=0.2)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--lengths", "10,x"), "--lengths: 'x' is not a whole number"),
        (("--lengths", "10,0"), "--lengths: 0 is below 1"),
        (("--users", "-3"), "--users: -3 is below 1"),
        (("--mean-length", "0"), "a history of 0 events: give lengths of 1 to 1,000,000"),
        (("--lengths", "2000000"), "a history of 2,000,000 events"),
    ],
)
def test_numbers_that_no_store_can_have_are_named_in_one_line(vql, arguments: tuple[str, str], words: str) -> None:
    assert_one_line(vql("size", *arguments), 2, words)


def test_a_checkpoint_without_items_is_told_how_to_get_them(vql, tmp_path: Path) -> None:
    checkpoint = small_checkpoint(tmp_path / "checkpoint")
    for path in checkpoint.items_path.iterdir():
        path.unlink()
    assert_one_line(vql("size", "--checkpoint", checkpoint.path), 3, "vql encode-items")
    write_items(checkpoint, [""], "items-00000.parquet")
    assert_one_line(vql("size", "--checkpoint", checkpoint.path), 2, "has no items; run vql encode-items")
