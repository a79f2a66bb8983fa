"""KuaiRec's matrices: a like is a watch ratio over two, and a row without a time is no event."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.jobs.datasets.published import events, items, prepared, write_files
from tests.jobs.tiny import logged

MATRIX = "user_id,video_id,play_duration,video_duration,time,date,timestamp,watch_ratio\n"
FILES = {
    "big_matrix.csv": MATRIX
    + "0,3649,13838,10867,2020-07-05 00:08:23.438,20200705,1593878903.438,1.273396521579093\n"
    + "0,9598,13665,10984,2020-07-05 00:13:41.297,20200705,1593879221.297,2.2440823015294975\n"
    # The big matrix has whole rows twice.
    + "0,9598,13665,10984,2020-07-05 00:13:41.297,20200705,1593879221.297,2.2440823015294975\n"
    + "1,3649,851,7908,2020-07-05 00:16:06.687,20200705,1593879366.687,2.0\n",
    "small_matrix.csv": MATRIX
    + "14,148,4381,6067,2020-07-05 05:27:48.378,20200705.0,1593898068.378,0.7221031811438932\n"
    + "14,183,11635,6100,,,,1.9073770491803279\n",
    "item_categories.csv": 'video_id,feat\n148,[8]\n183,"[27, 9]"\n3649,[9]\n9598,[1]\n',
    "item_daily_features.csv": "video_id,date,author_id,video_type,upload_dt,show_cnt\n"
    "148,20200705,3309,NORMAL,2020-03-30,12\n"
    "148,20200706,3309,NORMAL,2020-03-30,15\n"
    "3649,20200705,2528,AD,2020-03-30,1\n"
    "9598,20200705,2528,NORMAL,2020-03-30,1\n",
}


@pytest.mark.spark
def test_a_like_is_a_watch_ratio_over_two_and_a_row_twice_is_one_event(spark, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "data", FILES)
    done = prepared(spark, "kuairec_big", folder, tmp_path / "log")
    assert (done.events.appended, done.events.quarantined, done.items) == (3, 1, 4)
    assert events(tmp_path / "log") == {
        ("0", "3649", 1593878903438): ("0-3649-1593878903.438", "view"),
        ("0", "9598", 1593879221297): ("0-9598-1593879221.297", "like"),
        ("1", "3649", 1593879366687): ("1-3649-1593879366.687", "view"),
    }
    assert items(tmp_path / "log")["183"] == {"category": "27", "tags": "27|9", "author": None, "video_type": None}
    assert items(tmp_path / "log")["148"] == {
        "category": "8",
        "tags": "8",
        "author": "3309",
        "video_type": "NORMAL",
    }


@pytest.mark.spark
def test_a_view_without_a_time_is_quarantined(spark, tmp_path: Path) -> None:
    folder = write_files(tmp_path / "data", FILES)
    done = prepared(spark, "kuairec_small", folder, tmp_path / "log")
    assert (done.events.appended, done.events.quarantined) == (1, 1)
    (bad,) = logged(tmp_path / "log", "quarantine")
    assert bad["reason"] == "schema"
    assert '"video_id":"183"' in bad["source"]
