"""A checkpoint at a URL is the one that was put there, whole, or it is refused; and is fetched once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from uuid import uuid4

import fsspec
import pytest

from jobs import checkpoint_store
from jobs.bench_load import random_checkpoint
from jobs.checkpoint_store import Remote, cache_folder, fetch_checkpoint, holds_checkpoint, put_checkpoint, put_items
from models.checkpoint import Checkpoint, Sizes, open_checkpoint
from models.errors import CheckpointError, InputError, MachineError, MismatchError
from models.item_table import read_index
from tests.jobs.commands import assert_one_line

TINY = Sizes(width=8, groups=2, codewords=4, key_width=2, value_width=2, window=4)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VQL_CHECKPOINT_CACHE", str(tmp_path / "cache"))
    assert cache_folder() == tmp_path / "cache"
    return tmp_path / "cache"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    return random_checkpoint(tmp_path / "made", TINY)


@pytest.fixture(params=["file", "memory"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (tmp_path / "bucket" / "c").as_uri() if request.param == "file" else f"memory://{uuid4().hex}/c"


def bytes_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def write(url: str, name: str, data: bytes) -> None:
    files, root = fsspec.url_to_fs(url)
    files.pipe_file(f"{root}/{name}", data)


def test_what_was_put_is_fetched_with_its_items_into_a_folder_of_its_id(checkpoint, url, cache):
    assert not holds_checkpoint(url)
    put_checkpoint(checkpoint, url)
    assert holds_checkpoint(url)
    fetched = fetch_checkpoint(url)
    assert fetched == cache / checkpoint.checkpoint_id
    assert bytes_of(fetched) == bytes_of(checkpoint.path)
    assert [path.name for path in cache.iterdir()] == [checkpoint.checkpoint_id]
    assert open_checkpoint(fetched).fold().table.index == checkpoint.fold().table.index


def test_the_manifest_is_put_last_so_that_half_a_checkpoint_is_none(checkpoint, url, monkeypatch):
    put, names = Remote.put, []

    def until_the_manifest(self, source: Path, name: str) -> None:
        names.append(name)
        if name == "manifest.json":
            raise KeyboardInterrupt
        put(self, source, name)

    monkeypatch.setattr(Remote, "put", until_the_manifest)
    with pytest.raises(KeyboardInterrupt):
        put_checkpoint(checkpoint, url)
    assert len(names) > len(checkpoint.manifest.files)
    assert not holds_checkpoint(url)
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no manifest\.json"):
        fetch_checkpoint(url)


def test_it_is_fetched_once_and_again_when_the_cache_is_damaged(checkpoint, url, monkeypatch):
    put_checkpoint(checkpoint, url)
    got, get = [], Remote.get

    def counted(self, name: str, to: Path) -> None:
        got.append(name)
        get(self, name, to)

    monkeypatch.setattr(Remote, "get", counted)
    folder = fetch_checkpoint(url)
    first = len(got)
    assert fetch_checkpoint(url) == folder
    assert len(got) == first > 0

    (folder / "model.safetensors").write_bytes(b"damaged")
    fetch_checkpoint(url)
    assert bytes_of(folder) == bytes_of(checkpoint.path)


def test_what_does_not_match_its_hashes_is_refused_and_not_kept(checkpoint, url, cache):
    put_checkpoint(checkpoint, url)
    write(url, "model.safetensors", b"another's")
    with pytest.raises(CheckpointError, match="does not match its hash"):
        fetch_checkpoint(url)
    files, root = fsspec.url_to_fs(url)
    files.rm_file(f"{root}/model.safetensors")
    with pytest.raises(CheckpointError, match=f"{url}/model.safetensors is missing"):
        fetch_checkpoint(url)
    write(url, "manifest.json", b"{}")
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        fetch_checkpoint(url)
    assert list(cache.glob("[!.]*")) == list(cache.glob(".*")) == []


def test_a_manifest_that_names_files_elsewhere_is_refused(checkpoint, url, tmp_path):
    put_checkpoint(checkpoint, url)
    manifest = json.loads((checkpoint.path / "manifest.json").read_bytes())
    for name in ("../../elsewhere", "/elsewhere"):
        write(url, "manifest.json", json.dumps(manifest | {"files": {name: "0" * 64}}).encode())
        with pytest.raises(CheckpointError, match="names files outside of the checkpoint"):
            fetch_checkpoint(url)


def test_items_that_are_encoded_later_are_fetched_and_those_of_two_are_not_mixed(checkpoint, url, tmp_path):
    items = checkpoint.items_path
    shutil.move(items, tmp_path / "items")
    put_checkpoint(checkpoint, url)
    folder = fetch_checkpoint(url)
    assert not (folder / "items").exists()

    shutil.copytree(tmp_path / "items", items)
    put_items(checkpoint.path, url)
    put_items(checkpoint.path, url)
    assert bytes_of(fetch_checkpoint(url) / "items") == bytes_of(items)

    index = items / "items.json"
    segment = json.loads(index.read_bytes())["segments"][0]["name"]
    index.write_bytes(index.read_bytes().replace(segment.encode(), b"another"))
    with pytest.raises(MismatchError, match="were encoded by another run meanwhile; run vql encode-items again"):
        put_items(checkpoint.path, url)
    assert read_index(fetch_checkpoint(url) / "items").segments[0].name == segment


def test_places_that_cannot_be_reached_are_said(tmp_path, checkpoint):
    with pytest.raises(InputError, match="nosuch://a/b cannot be used: Protocol not known"):
        fetch_checkpoint("nosuch://a/b")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(MachineError, match=r"cannot be reached: (FileExistsError|NotADirectoryError)"):
        put_checkpoint(checkpoint, (tmp_path / "file" / "c").as_uri())
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MachineError, match="needs a package that is not installed: Install s3fs to access S3"):
            fetch_checkpoint("s3://bucket/c")


@pytest.mark.spark
def test_commands_take_a_url_where_they_take_a_checkpoint(vql, checkpoint, url, tmp_path):
    put_checkpoint(checkpoint, url)
    said = vql("inspect", url)
    assert said.code == 0
    assert checkpoint.checkpoint_id in said.out
    said = vql("release", "add", url, "--releases", tmp_path / "releases")
    assert said.code == 0, said.err
    said = vql("release", "list", "--releases", tmp_path / "releases", "--json")
    assert str(checkpoint_store.cache_folder() / checkpoint.checkpoint_id) in said.out
    nothing = url.removesuffix("/c") + "/nothing"
    for command in (["backfill", "--log", "l", "--state", "s"], ["serve", "--state", "s"]):
        said = vql(*command, "--checkpoint", nothing)
        assert_one_line(said, 3, "CheckpointError", f"{nothing} is no checkpoint")
