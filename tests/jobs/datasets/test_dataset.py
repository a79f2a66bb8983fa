"""What is missing or wrong is named with its remedy; every data set declares what it uses."""

from __future__ import annotations

from pathlib import Path

import pytest

from jobs.datasets import DATASETS
from jobs.protocols import check_plan
from models.errors import InputError
from models.event import Event
from tests.jobs.commands import assert_one_line
from tests.jobs.datasets.published import prepared, write_files
from tests.jobs.datasets.test_kuairec import FILES


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_declares_what_it_uses(name: str) -> None:
    data = DATASETS[name]
    assert data.name == name
    assert set(data.columns) <= set(Event.__struct_fields__)
    assert "item_id" in data.item_columns
    assert set(data.fields) < set(data.item_columns)
    assert data.within is None or data.within in data.fields
    assert bool(data.shown) == bool(data.clicked)
    for protocol in data.protocols:
        check_plan(data.plan(protocol))
    with pytest.raises(InputError, match=f"{name} is evaluated by .*, not by 'seen'"):
        data.plan("seen")


def test_a_folder_without_the_files_is_told_which_and_how(tmp_path: Path) -> None:
    kuairec = DATASETS["kuairec_big"]
    with pytest.raises(InputError, match=r"kuairec_big has to be fetched by yourself \(CC BY-SA.*--path"):
        kuairec.find(None)
    write_files(tmp_path, {"big_matrix.csv": "", "item_categories.csv": ""})
    with pytest.raises(InputError, match=r"has no item_daily_features\.csv: kuairec_big needs .*--path .*--file ROLE"):
        kuairec.find(tmp_path)
    write_files(tmp_path / "data", FILES)
    assert kuairec.find(tmp_path) == tmp_path / "data"
    with pytest.raises(InputError, match=r"--file matrix=\.\.\.: kuairec_big has the files events, items, daily"):
        kuairec.altered({"matrix": "m.csv"}, {}, {})


@pytest.mark.spark
@pytest.mark.parametrize("name", ["small_matrix.csv", "item_categories.csv"])
def test_a_file_of_other_columns_is_refused_before_anything_is_written(spark, tmp_path: Path, name: str) -> None:
    folder = write_files(tmp_path / "in", FILES | {name: "a,video_id\n1,2\n"})
    with pytest.raises(InputError, match=rf"{name} has no columns .*\(its columns: a, video_id\); is it the file of"):
        prepared(spark, "kuairec_small", folder, tmp_path / "log")
    assert not (tmp_path / "log").exists()


def test_list_shows_every_data_set_with_its_files(vql) -> None:
    said = vql("data", "list")
    assert said.code == 0
    for name, data in DATASETS.items():
        assert name in said.out
        assert all(file.name in said.out for file in data.files.values())


def test_an_unknown_data_set_and_a_missing_file_are_one_line(vql, tmp_path: Path) -> None:
    log = ["--log", tmp_path / "log"]
    assert_one_line(vql("data", "prepare", "netflix", *log), 2, "InputError", "'netflix' is none of completejourney")
    said = vql("data", "prepare", "tmall", "--path", tmp_path, *log)
    assert_one_line(said, 2, "InputError", "user_log_format1.csv", "--path")
    said = vql("data", "prepare", "tmall", "--path", tmp_path, *log, "--file", "log")
    assert_one_line(said, 2, "InputError", "'log' is not as in --file: ROLE=NAME")
