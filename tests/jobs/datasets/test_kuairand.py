"""KuaiRand's three logs become one, with exactly the clicks as positives; prior items come before what was shown."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable

from jobs.datasets import DATASETS
from tests.jobs.datasets.published import events, items, prepared, write_files
from tests.shared_data import shared_file

LOG = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab\n"
)
FILES = {
    "log_standard_4_08_to_4_21_1k.csv": LOG
    + "0,11,20220410,600,1649541200000,1,0,0,0,0,0,1,20000,18000,0,0,0,0,1\n"
    + "0,12,20220410,600,1649541200000,0,1,0,0,0,0,0,0,18000,0,0,0,0,1\n",
    "log_standard_4_22_to_5_08_1k.csv": LOG
    + "0,13,20220423,900,1650672000000,1,1,0,0,0,0,1,9000,8000,0,0,0,0,0\n"
    + "7,13,20220423,901,1650672060000,1,0,0,0,0,0,0,9000,80000,0,0,0,0,0\n",
    "log_random_4_22_to_5_08_1k.csv": LOG + "7,11,20220424,905,1650762000000,0,0,0,0,0,0,0,300,18000,0,0,0,1,0\n",
    "video_features_basic_1k.csv": "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,"
    "server_width,server_height,music_id,music_type,tag\n"
    '11,501,NORMAL,2022-04-08,ShortImport,0,18000,720,1280,31,9,"39,6"\n'
    "12,502,NORMAL,2022-04-08,ShortImport,0,18000,720,1280,32,9,12\n"
    "13,501,AD,2022-04-08,ShortImport,0,,720,1280,33,9,\n",
}


def described(*features: str | None) -> dict:
    return dict(zip(("category", "tags", "author", "video_type", "music", "duration"), features, strict=True))


@pytest.mark.spark
def test_the_three_logs_of_the_archive_are_one_log(spark, tmp_path: Path) -> None:
    # The archive has its files in a folder `data`.
    write_files(tmp_path / "KuaiRand-1K" / "data", FILES)
    done = prepared(spark, "kuairand_1k", tmp_path / "KuaiRand-1K", tmp_path / "log")
    assert (done.events.appended, done.events.quarantined, done.items) == (5, 0, 3)
    assert events(tmp_path / "log") == {
        ("0", "11", 1649541200000): ("0-11-1649541200000", "long_view"),
        # A like without a click.
        ("0", "12", 1649541200000): ("0-12-1649541200000", "impression"),
        ("0", "13", 1650672000000): ("0-13-1650672000000", "like"),
        ("7", "13", 1650672060000): ("7-13-1650672060000", "click"),
        ("7", "11", 1650762000000): ("7-11-1650762000000", "impression"),
    }
    assert items(tmp_path / "log") == {
        "11": described("39", "39|6", "501", "NORMAL", "31", "18000"),
        "12": described("12", "12", "502", "NORMAL", "32", "18000"),
        "13": described(None, None, "501", "AD", "33", None),
    }


@pytest.mark.spark
def test_prior_items_keep_their_order_and_end_at_the_time_that_is_known(spark, tmp_path: Path) -> None:
    prior = {
        "user_id": pa.array([4], pa.int32()),
        "history_len": pa.array([90], pa.int32()),
        "last_time_ms": [1650000000000],
        "watch_seq": pa.array([[3, 3, 1, 2]], pa.list_(pa.int16())),
        "like_seq": pa.array([[2]], pa.list_(pa.int16())),
        "long_watch_seq": pa.array([[1, 2]], pa.list_(pa.int16())),
    }
    tail = {
        "user_id": pa.array([4, 4], pa.int32()),
        "item_id": pa.array([1, 3], pa.int32()),
        "ts": [1650812741436, 1650812800000],
        **{name: pa.array([1, 0], pa.int8()) for name in ("is_click", "is_like", "long_view")},
    }
    video = {
        "item_id": pa.array([1, 2, 3], pa.int32()),
        "author_id": [71, 72, 71],
        "video_type": ["NORMAL"] * 3,
        "music_id": [1, 2, 3],
        "tag": ["20,43", "2", None],
        "video_duration": [18000.0, 5000.0, None],
    }
    for name, columns in (("prior_sequences", prior), ("tail_events", tail), ("items", video)):
        pq.write_table(pa.table(columns), tmp_path / f"kuairand_pure_{name}.parquet")
    done = prepared(spark, "kuairand_pure", tmp_path, tmp_path / "log")
    assert (done.events.appended, done.events.quarantined, done.items) == (6, 0, 3)
    assert events(tmp_path / "log") == {
        ("4", "3", 1649999997000): ("prior-4-0", "prior_watch"),
        ("4", "3", 1649999998000): ("prior-4-1", "prior_watch"),
        ("4", "1", 1649999999000): ("prior-4-2", "prior_long_view"),
        ("4", "2", 1650000000000): ("prior-4-3", "prior_like"),
        ("4", "1", 1650812741436): ("4-1-1650812741436", "like"),
        ("4", "3", 1650812800000): ("4-3-1650812800000", "impression"),
    }
    assert items(tmp_path / "log")["1"] == described("20", "20|43", "71", "NORMAL", "1", "18000.0")


@pytest.mark.spark
def test_the_real_part_of_kuairand_pure_has_exactly_its_clicks(spark, tmp_path: Path) -> None:
    path = shared_file("kuairand_pure_tail_events.parquet").parent
    tail = pq.read_table(path / "kuairand_pure_tail_events.parquet", filters=[("user_id", "<", 500)])
    done = prepared(spark, "kuairand_pure", path, tmp_path / "log", where="user_id < 500")
    assert done.items == 7583
    log = DeltaTable(tmp_path / "log" / "events").to_pyarrow_table()
    shown = np.array([not action.startswith("prior") for action in log["action"].to_pylist()])
    clicked = np.isin(log["action"].to_pylist(), DATASETS["kuairand_pure"].clicked)
    facts = set(zip(*(tail[c].to_pylist() for c in ("user_id", "item_id", "ts", "is_click")), strict=True))
    # A few rows in a hundred are there twice.
    assert shown.sum() == len({fact[:3] for fact in facts}) > 3000
    assert done.events.quarantined == tail.num_rows - shown.sum()
    assert clicked.sum() == sum(fact[3] for fact in facts)
