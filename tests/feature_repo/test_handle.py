from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from feature_repo.handle import PACKAGED_REPO, StoreHandle, absolute_path, open_rows, read_config
from feature_repo.redis_settings import RedisSettings
from feature_repo.sqlite_store import SqliteRows
from models.errors import InputError


def repo_with(folder: Path, text: str) -> Path:
    (folder / "feature_store.yaml").write_text(text)
    return folder


def test_a_handle_that_travelled_opens_the_store_of_its_state_folder(tmp_path):
    rows = pickle.loads(pickle.dumps(StoreHandle(state=tmp_path))).open()
    assert isinstance(rows, SqliteRows)
    assert rows.path == tmp_path / "online.db"
    rows.positions("c")
    assert (tmp_path / "online.db").exists()


def test_a_relative_state_folder_is_one_under_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert StoreHandle(state=Path("state")).open().path == tmp_path / "state" / "online.db"


def test_a_state_folder_with_an_awkward_name_stays_one_path(tmp_path):
    state = tmp_path / "a b#c $HOME: x"
    assert StoreHandle(state=state).open().path == state / "online.db"


def test_the_options_of_the_store_come_from_the_file(tmp_path):
    text = (PACKAGED_REPO / "feature_store.yaml").read_text().replace("online.db'", "rows.db'\n  ttl_s: 60")
    rows = StoreHandle(state=tmp_path / "state", repo=repo_with(tmp_path, text)).open()
    assert (rows.path, rows.ttl_s) == (tmp_path / "state" / "rows.db", 60)


def test_redis_is_chosen_where_its_address_is_set_and_the_choice_travels_with_the_handle(tmp_path, monkeypatch):
    monkeypatch.setenv("VQL_REDIS_URL", "redis://cache.example:6379/0")
    sent = pickle.dumps(StoreHandle(state=tmp_path))
    monkeypatch.delenv("VQL_REDIS_URL")
    arrived = pickle.loads(sent)
    assert arrived.open().settings.url == "redis://cache.example:6379/0"
    assert hash(arrived) == hash(pickle.loads(sent))
    assert isinstance(StoreHandle(state=tmp_path).open(), SqliteRows)


def test_the_time_to_live_of_the_file_holds_on_redis_unless_its_settings_have_one(tmp_path):
    text = (PACKAGED_REPO / "feature_store.yaml").read_text().replace("online.db'", "online.db'\n  ttl_s: 60")
    repo, url = repo_with(tmp_path, text), "redis://cache.example:6379/0"
    for settings, ttl_s in ((RedisSettings(url=url), 60), (RedisSettings(url=url, ttl_s=5), 5)):
        assert StoreHandle(state=tmp_path, repo=repo, redis=settings).open().settings.ttl_s == ttl_s


def test_wrong_settings_of_redis_are_an_error_and_not_the_embedded_store(tmp_path, monkeypatch):
    monkeypatch.setenv("VQL_REDIS_URL", "cache.example:6379")
    with pytest.raises(InputError, match="VQL_REDIS_URL"):
        StoreHandle(state=tmp_path)


def test_opening_the_store_imports_neither_feast_nor_torch(tmp_path):
    code = (
        "import sys; from pathlib import Path; from feature_repo.handle import StoreHandle; "
        "StoreHandle(state=Path(sys.argv[1])).open().positions('c'); "
        "print(sorted({'feast', 'torch', 'apache_beam', 'pyspark'} & set(sys.modules)))"
    )
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert said.stdout.strip() == "[]"


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(InputError, match=r"feature_store\.yaml cannot be read"):
        read_config(tmp_path, tmp_path)


@pytest.mark.parametrize("text", ["online_store: [", "\tonline_store: {}", "just words", "", "online_store: sqlite"])
def test_a_file_that_cannot_be_used_is_named(tmp_path, text):
    with pytest.raises(InputError, match=r"feature_store\.yaml (is not YAML|has no section online_store)"):
        read_config(tmp_path, repo_with(tmp_path, text))


@pytest.mark.parametrize("kind", ["sqlite", "redis", None, 3])
def test_a_store_without_a_fence_is_refused(kind):
    with pytest.raises(InputError, match=r"has no fence: set online_store\.type to feature_repo"):
        open_rows({"type": kind, "path": "/x/online.db"}, None)


def test_a_store_without_a_path_is_refused():
    with pytest.raises(InputError, match=r"online_store\.path is missing"):
        open_rows({"type": "feature_repo.online_store.FencedOnlineStore"}, None)


@pytest.mark.parametrize("path", ["${VQL_STATE}/online.db", "online.db", "~/online.db"])
def test_a_path_that_is_not_settled_is_refused(path):
    with pytest.raises(InputError, match="VQL_STATE"):
        absolute_path(path)
