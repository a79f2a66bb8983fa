"""`vql serve` on a table of releases: it follows what is live, and each request is answered by one checkpoint."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from feature_repo.handle import StoreHandle
from jobs.serving.live import LiveScorer, version_of
from models.errors import CheckpointError, StoreError
from tests.jobs.commands import assert_one_line
from tests.jobs.releases.way import take_live, take_to_shadow
from tests.jobs.serving.processes import load, serving, wait_until
from tests.jobs.serving.shop import CANDIDATES, bodies, put_rows, request, user_ids
from tests.jobs.serving.test_server import wanted_scores
from tests.small_ranker import scoring_checkpoint


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "releases"


def test_a_table_names_what_is_live_and_nothing_else_of_it_matters(tmp_path: Path, table: Path) -> None:
    first, second = (scoring_checkpoint(tmp_path / name, seed) for name, seed in (("first", 5), ("second", 6)))
    take_to_shadow(table, first.checkpoint_id, first.path)
    with pytest.raises(CheckpointError, match=f"none of the releases {table} is live; run vql release promote"):
        version_of(table)
    take_live(table, first.checkpoint_id, first.path)
    (tmp_path / "link").symlink_to(table)
    found = version_of(table)
    assert (found.folder, found.checkpoint_id) == (first.path.resolve(), first.checkpoint_id)
    assert found == version_of(tmp_path / "link")
    take_to_shadow(table, second.checkpoint_id, second.path)
    assert version_of(table) == found
    take_live(table, second.checkpoint_id, second.path)
    assert version_of(table).checkpoint_id == second.checkpoint_id
    max((table / "_delta_log").glob("*.json")).write_text("{")
    with pytest.raises(StoreError, match="cannot be read"):
        version_of(table)


def test_a_release_whose_folder_holds_another_checkpoint_is_not_swapped_in(tmp_path: Path, table: Path) -> None:
    first, second = (scoring_checkpoint(tmp_path / name, seed) for name, seed in (("first", 5), ("second", 6)))
    take_live(table, first.checkpoint_id, second.path)
    with pytest.raises(CheckpointError, match=f"release {first.checkpoint_id} is live, and {second.path} holds"):
        LiveScorer(table, lambda path: _Named(second.checkpoint_id))  # type: ignore[arg-type]


class _Named:
    def __init__(self, checkpoint_id: str) -> None:
        self.checkpoint_id = checkpoint_id


@pytest.mark.slow
def test_promotions_and_rollbacks_under_load_are_followed_and_no_answer_mixes_two(
    vql, tmp_path: Path, table: Path
) -> None:
    first, second = (scoring_checkpoint(tmp_path / name, seed) for name, seed in (("first", 5), ("second", 6)))
    state = tmp_path / "state"
    state.mkdir()
    rows = StoreHandle(state=state, redis=None).open()
    for each in (first, second):
        put_rows(each, rows)
    wanted = {each.checkpoint_id: wanted_scores(each, state) for each in (first, second)}
    take_live(table, first.checkpoint_id, first.path)
    take_to_shadow(table, second.checkpoint_id, second.path)
    store, whole = ["--releases", table, "--state", state], ["--releases", table]
    several = request(dict.fromkeys(user_ids()[:4], CANDIDATES))
    with serving(table, state) as server, load(server, [*bodies(), several]) as seen:

        def answered_by(checkpoint_id: str) -> bool:
            return bool(seen.answers) and seen.answers[-1][1]["checkpoint_id"] == checkpoint_id

        wait_until(lambda: answered_by(first.checkpoint_id))
        for command, now_live in (
            (["promote", second.checkpoint_id, *store], second),
            (["rollback", second.checkpoint_id, *whole], first),
            (["promote", second.checkpoint_id, *store], second),
        ):
            assert vql("release", *command).code == 0
            wait_until(lambda now_live=now_live: answered_by(now_live.checkpoint_id))
            assert json.loads(server.get("/readyz")[1])["checkpoint_id"] == now_live.checkpoint_id
        settled = len(seen.answers)
        wait_until(lambda: len(seen.answers) > settled + 100)
        # What was left is retired while requests come: nobody asks for its rows any more.
        assert vql("release", "retire", first.checkpoint_id, *store, "--idle-s", 0).code == 0
        settled = len(seen.answers)
        wait_until(lambda: len(seen.answers) > settled + 100)
    assert (seen.statuses.keys(), seen.lost) == ({200}, [])
    assert Counter(answer["checkpoint_id"] for _, answer in seen.answers).keys() == wanted.keys()
    for _, answer in seen.answers:
        for user in answer["users"]:
            assert user["history"] == "fresh"
            assert user["scores"] == pytest.approx(wanted[answer["checkpoint_id"]][user["user_id"]], abs=1e-5)
    assert [line["event"] for line in server.lines()].count("checkpoint swapped") == 3


@pytest.mark.slow
def test_a_table_where_nothing_is_live_is_one_line(vql, tmp_path: Path, table: Path) -> None:
    checkpoint = scoring_checkpoint(tmp_path / "checkpoint")
    take_to_shadow(table, checkpoint.checkpoint_id, checkpoint.path)
    (tmp_path / "state").mkdir()
    said = vql("serve", "--checkpoint", table, "--state", tmp_path / "state", "--port", 0)
    assert_one_line(said, 3, "CheckpointError", "is live; run vql release promote")
