from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest

from feature_repo.handle import PACKAGED_REPO, StoreHandle
from feature_repo.repo import open_repo, register, rows_of
from feature_repo.views import service_name, view_name
from models.errors import InputError
from tests.feature_repo.subjects import bytes_of, stamp, whole


def names(feast):
    return sorted(view.name for view in feast.list_feature_views())


def test_opening_makes_the_state_folder_and_sets_it_for_children(state):
    feast = open_repo(state / "deeper")
    assert (state / "deeper").is_dir()
    assert os.environ["VQL_STATE"] == str(state / "deeper")
    assert feast.project == "vql"


def test_a_registered_checkpoint_is_there_at_once_and_for_others(feast, state, checkpoint):
    register(feast, checkpoint.checkpoint_id)
    for seen_by in (feast, open_repo(state)):
        assert names(seen_by) == [view_name(checkpoint.checkpoint_id)]
        assert [e.name for e in seen_by.list_entities()] == ["user"]
        assert seen_by.get_feature_service(service_name(checkpoint.checkpoint_id)).name


def test_registering_leaves_the_others_alone_and_says_nothing(feast, checkpoint, other_checkpoint, capfd, caplog):
    register(feast, checkpoint.checkpoint_id)
    register(feast, other_checkpoint.checkpoint_id)
    register(feast, checkpoint.checkpoint_id)
    assert names(feast) == sorted(view_name(c.checkpoint_id) for c in (checkpoint, other_checkpoint))
    assert capfd.readouterr() == ("", "")
    assert caplog.text == ""


def test_registrations_at_the_same_time_are_all_kept(state):
    ids = [f"{n:032x}"[::-1] for n in range(1, 9)]
    stores = [open_repo(state) for _ in ids]
    threads = [threading.Thread(target=register, args=pair) for pair in zip(stores, ids, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert names(open_repo(state)) == sorted(view_name(i) for i in ids)


def test_feast_and_the_handle_name_the_same_store(feast, state):
    c = "c" * 32
    assert rows_of(feast).put_rows(c, [whole("u", stamp(1))]) == [True]
    assert StoreHandle(state=state).open().get_rows(c, ["u"]) == [bytes_of(whole("u", stamp(1)))]
    assert rows_of(feast).path == StoreHandle(state=state).open().path == state / "online.db"


def test_the_options_of_another_repo_reach_the_store(state, tmp_path):
    text = (PACKAGED_REPO / "feature_store.yaml").read_text().replace("online.db'", "rows.db'\n  ttl_s: 60")
    (tmp_path / "feature_store.yaml").write_text(text)
    rows = rows_of(open_repo(state, tmp_path))
    assert (rows.path, rows.ttl_s) == (state / "rows.db", 60)


def test_a_repo_without_its_file_is_named(state, tmp_path):
    with pytest.raises(InputError, match=r"feature_store\.yaml cannot be read"):
        open_repo(state, tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("project: vql", "project: '-'"),
        ("project: vql\n", ""),
        ("online.db'", "online.db'\n  colour: red"),
        ("type: file", "type: papyrus"),
        ("registry:\n", "registre:\n"),
    ],
)
def test_a_file_that_feast_refuses_is_named(state, tmp_path, old, new):
    text = (PACKAGED_REPO / "feature_store.yaml").read_text()
    assert old in text
    (tmp_path / "feature_store.yaml").write_text(text.replace(old, new, 1))
    with pytest.raises(InputError, match=r"feature_store\.yaml"):
        open_repo(state, tmp_path)


def test_a_state_folder_that_cannot_be_made_is_an_error(state, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((InputError, OSError), match="file"):
        open_repo(Path(tmp_path / "file" / "state"))
