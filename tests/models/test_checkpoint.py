"""A checkpoint is whole, verified and named by its content, or it is refused."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import numpy as np
import pytest

from models.checkpoint import (
    ACTION_VALUES,
    Checkpoint,
    Manifest,
    Sizes,
    identify,
    open_checkpoint,
    write_checkpoint,
)
from models.errors import CheckpointError
from tests.models.test_files import on_a_small_disk
from tests.small import ACTIONS, HOUR_MS, ITEMS, small_checkpoint

FILES = ["model.safetensors", "vocabulary/item_id.parquet"]


def make_manifest(**changes: object) -> Manifest:
    manifest = Manifest(
        model="vql",
        sizes=Sizes(width=8, heads=2, groups=2, codewords=8, key_width=4, value_width=3),
        half_life_ms=[[None, 1000.0], [2000.0, 4000.0]],
        actions=["other", "view"],
        fields=["item_id"],
        training={"seed": 1},
        metrics={"gauc": 0.5},
        files={},
    )
    return msgspec.structs.replace(manifest, **changes)


def write(path: Path, fill: float = 1.0, **changes: object) -> Checkpoint:
    return write_checkpoint(path, make_manifest(**changes), {"a": np.full((2, 3), fill)}, {"item_id": ["x", "y"]})


def edit_manifest(path: Path, **changes: object) -> None:
    file = path / "manifest.json"
    file.write_bytes(msgspec.json.encode(msgspec.json.decode(file.read_bytes()) | changes))


def flip(file: Path, at: int, change: int = 1) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= change
    file.write_bytes(data)


def test_a_manifest_of_before_the_window_has_none(tmp_path):
    write(tmp_path / "c")
    sizes = msgspec.structs.asdict(make_manifest().sizes)
    del sizes["newest"]
    raw = msgspec.json.decode((tmp_path / "c" / "manifest.json").read_bytes())
    (tmp_path / "c" / "manifest.json").write_bytes(msgspec.json.encode(raw | {"sizes": sizes}))
    manifest = open_checkpoint(tmp_path / "c").manifest
    assert manifest.sizes.newest == 0


def test_more_newest_events_than_a_row_is_sure_to_keep_are_refused():
    Sizes(window=50, newest=50)
    with pytest.raises(ValueError, match="newest 51 events are not in rows that keep 50"):
        Sizes(window=50, newest=51)


def test_a_checkpoint_opens_as_it_was_written(tmp_path):
    written = write(tmp_path / "c")
    opened = open_checkpoint(tmp_path / "c")
    assert opened == written
    assert msgspec.structs.replace(opened.manifest, files={}) == make_manifest()
    assert sorted(opened.manifest.files) == FILES
    np.testing.assert_array_equal(opened.tensors()["a"], np.full((2, 3), 1.0))
    assert list(opened.tensors(["a"])) == ["a"]
    assert opened.vocabulary("item_id") == ["x", "y"]
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_the_id_is_the_same_for_the_same_content_anywhere(tmp_path):
    first, second = write(tmp_path / "a"), write(tmp_path / "elsewhere" / "b")
    assert first.checkpoint_id == second.checkpoint_id
    assert len(bytes.fromhex(first.checkpoint_id)) == 16
    assert first.checkpoint_id == identify((tmp_path / "a" / "manifest.json").read_bytes())


def test_the_id_depends_on_every_part_of_the_content(tmp_path):
    made = [
        write(tmp_path / "a"),
        write(tmp_path / "b", fill=2.0),
        write(tmp_path / "c", half_life_ms=[[None, 1000.0], [2000.0, 4001.0]]),
        write(tmp_path / "d", actions=["other", "buy"]),
        write(tmp_path / "e", metrics={"gauc": 0.6}),
        write_checkpoint(tmp_path / "f", make_manifest(), {"a": np.full((2, 3), 1.0)}, {"item_id": ["y", "x"]}),
    ]
    assert len({checkpoint.checkpoint_id for checkpoint in made}) == len(made)


def test_the_item_table_is_not_part_of_the_identity(tmp_path):
    checkpoint = small_checkpoint(tmp_path / "c")
    shutil.rmtree(checkpoint.items_path)
    assert open_checkpoint(tmp_path / "c").checkpoint_id == checkpoint.checkpoint_id


def test_the_spec_holds_the_decay_rates_and_zero_for_never(tmp_path):
    spec = write(tmp_path / "c").spec
    np.testing.assert_allclose(spec.rate_HR, np.log(2) / np.array([[np.inf, 1000.0], [2000.0, 4000.0]]))
    assert (spec.heads, spec.rates, spec.groups, spec.codewords, spec.value_width) == (2, 2, 2, 8, 3)
    assert spec.rate_GPR.shape == (2, 1, 2)


def test_actions_that_were_not_trained_are_other(tmp_path):
    assert write(tmp_path / "c").action_index(["view", "shout", "other", ""]).tolist() == [1, 0, 0, 0]


def test_a_writer_of_rows_gets_sizes_window_and_table(tmp_path):
    checkpoint = small_checkpoint(tmp_path / "c", window=7, rates=3)
    using = checkpoint.fold()
    assert (using.window, len(using.table), using.spec.rates) == (7, ITEMS + 1, 3)
    assert using.spec.rate_HR[0, 0] == np.log(2) / HOUR_MS
    np.testing.assert_array_equal(using.table.action_value_AHD, checkpoint.tensors()[ACTION_VALUES])
    assert checkpoint.manifest.actions == ACTIONS


@pytest.mark.parametrize("make", [lambda p: None, lambda p: p.mkdir(), lambda p: p.write_bytes(b"a file")])
def test_what_has_no_manifest_is_no_checkpoint(tmp_path, make):
    make(tmp_path / "c")
    with pytest.raises(CheckpointError, match=r"is no checkpoint: it has no manifest\.json"):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b'"text"', b'{"format_version": 1}', b"\xff\xfe", b'{"a": "\xff"}']
)
def test_a_damaged_manifest_is_refused(tmp_path, damage):
    write(tmp_path / "c")
    (tmp_path / "c" / "manifest.json").write_bytes(damage)
    with pytest.raises(CheckpointError):
        open_checkpoint(tmp_path / "c")


def test_a_manifest_with_any_byte_changed_is_refused_or_is_another_checkpoint(tmp_path):
    checkpoint = write(tmp_path / "c")
    file = tmp_path / "c" / "manifest.json"
    whole = file.read_bytes()
    escaped = set()
    for at in range(len(whole)):
        for change in (0x01, 0x02, 0x80):
            flip(file, at, change)
            try:
                assert open_checkpoint(tmp_path / "c").checkpoint_id != checkpoint.checkpoint_id
            except CheckpointError:
                pass
            except Exception as error:
                escaped.add(f"{type(error).__name__} at {whole[max(0, at - 12) : at + 2]!r}: {error}")
            file.write_bytes(whole)
    assert escaped == set()


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_an_unknown_version_is_refused_and_named(tmp_path, version):
    write(tmp_path / "c")
    edit_manifest(tmp_path / "c", format_version=version, sizes="of a later time")
    with pytest.raises(CheckpointError, match=f"format {version!r}; this program knows 1"):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize(
    "sizes", [{"heads": 3, "groups": 2}, {"heads": 4, "groups": 4, "codewords": 2**15}, {"groups": 0}, {"heads": "4"}]
)
def test_impossible_sizes_are_refused(tmp_path, sizes):
    write(tmp_path / "c")
    edit_manifest(tmp_path / "c", sizes=sizes)
    with pytest.raises(CheckpointError, match="damaged"):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(tmp_path, name):
    write(tmp_path / "c")
    (tmp_path / "c" / name).unlink()
    with pytest.raises(CheckpointError, match=f"{name} is missing"):
        open_checkpoint(tmp_path / "c")


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_byte_and_truncation_of_a_file_is_refused(tmp_path, name):
    write(tmp_path / "c")
    file = tmp_path / "c" / name
    whole = file.read_bytes()
    for at in range(0, len(whole), max(1, len(whole) // 40)):
        flip(file, at)
        with pytest.raises(CheckpointError, match=f"{name} does not match its hash"):
            open_checkpoint(tmp_path / "c")
        file.write_bytes(whole[:at])
        with pytest.raises(CheckpointError, match=f"{name} does not match its hash"):
            open_checkpoint(tmp_path / "c")
        file.write_bytes(whole)
    open_checkpoint(tmp_path / "c")


def test_a_parameter_file_damaged_after_opening_is_a_checkpoint_error(tmp_path):
    checkpoint = write(tmp_path / "c")
    file = tmp_path / "c" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:20])
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.tensors()
    file.unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.tensors(["a"])


def test_a_checkpoint_is_replaced_whole(tmp_path):
    first = write(tmp_path / "c")
    (tmp_path / "c" / "items").mkdir()
    second = write(tmp_path / "c", fill=2.0)
    assert second.checkpoint_id != first.checkpoint_id
    assert not second.items_path.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_a_write_that_fails_leaves_the_old_checkpoint_and_no_part(tmp_path):
    first = write(tmp_path / "c")
    with pytest.raises(OSError, match="missing-folder"):
        write_checkpoint(tmp_path / "c", make_manifest(), {"a": np.ones(3)}, {"missing-folder/item_id": ["x"]})
    assert open_checkpoint(tmp_path / "c") == first
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


def test_what_a_killed_writer_left_does_not_stop_the_next_one(tmp_path):
    partial = tmp_path / ".c.new"
    (partial / "vocabulary").mkdir(parents=True)
    (partial / "model.safetensors").write_bytes(b"a part")
    with pytest.raises(CheckpointError, match="no checkpoint"):
        open_checkpoint(partial)
    write(tmp_path / "c")
    assert [p.name for p in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize(("parameters", "words"), [(100_000, 1), (1, 100_000)])
def test_a_full_disk_is_a_machine_error_and_the_old_checkpoint_stays(tmp_path, parameters, words):
    program = f"""
import sys
from pathlib import Path
import numpy as np
from models.checkpoint import open_checkpoint, write_checkpoint
from models.errors import MachineError
from tests.models.test_checkpoint import make_manifest, write
path = Path(sys.argv[1]) / "c"
first = write(path)
vocabulary = {{"item_id": [str(n) for n in range({words})]}}
try:
    write_checkpoint(path, make_manifest(), {{"a": np.zeros({parameters})}}, vocabulary)
except MachineError as error:
    print(error)
except Exception as error:
    print(repr(error))
assert open_checkpoint(path) == first
assert [p.name for p in path.parent.iterdir()] == ["c"]
"""
    printed = on_a_small_disk(tmp_path, program)
    assert printed == f"no space left to write {tmp_path}/c; free some and run the same command again\n"
