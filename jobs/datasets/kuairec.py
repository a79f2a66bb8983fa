"""KuaiRec: what users of the short-video app Kuaishou watched, and which part of each video (version 2.0 of the files).

There is no click: the action is "like" where watch_ratio is over 2, as the data's README proposes, else "view"; the
small matrix holds nearly every pair of its users and videos. `timestamp` is in seconds with a fraction. Some rows of
the small matrix have no time: they are no events, and go to the quarantine, as repeated rows of the big one do.
item_categories.csv has a video's tags as a list in one cell, "[27, 9]"; item_daily_features.csv has a row for each
video and day, of which only the author and the type are taken, which do not change.

Terms: CC BY-SA 4.0. Gao et al., "KuaiRec: A Fully-observed Dataset and Insights for Evaluating Recommender Systems",
CIKM 2022, arXiv 2202.10842.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.datasets.dataset import DataSet, Read, SourceFile

if TYPE_CHECKING:
    from pyspark.sql import DataFrame


def _described(read: Read) -> DataFrame:
    daily = read("daily").groupBy("video_id").agg({"author_id": "min", "video_type": "min"})
    daily = daily.toDF("video_id", *(name.partition("(")[2].rstrip(")") for name in daily.columns[1:]))
    tags = read("items").selectExpr("video_id", "regexp_replace(feat, '[^0-9,]', '') AS feat")
    return tags.join(daily, "video_id", "full")


def _kuairec(size: str, about: str) -> DataSet:
    return DataSet(
        name=f"kuairec_{size}",
        about=about,
        terms="CC BY-SA 4.0, from its authors (kuairec.com); not part of this package",
        files={
            "events": SourceFile(
                name=f"{size}_matrix.csv", columns=("user_id", "video_id", "timestamp", "watch_ratio")
            ),
            "items": SourceFile(name="item_categories.csv", columns=("video_id", "feat")),
            "daily": SourceFile(name="item_daily_features.csv", columns=("video_id", "author_id", "video_type")),
        },
        events=lambda read: read("events"),
        columns={
            # Null, and so no event, where there is no time.
            "event_id": "concat(user_id, '-', video_id, '-', timestamp)",
            "user_id": "user_id",
            "item_id": "video_id",
            "action": "if(double(watch_ratio) > 2, 'like', 'view')",
            "event_time_ms": "bigint(round(double(timestamp) * 1000))",
        },
        items=_described,
        item_columns={
            "item_id": "video_id",
            "category": "element_at(split(feat, ','), 1)",
            "tags": "replace(feat, ',', '|')",
            "author": "author_id",
            "video_type": "video_type",
        },
        fields=("category", "author"),
        shown=("view",),
        clicked=("like",),
    )


KUAIREC_BIG = _kuairec("big", "12.5 million views of 10,728 videos by 7,176 users, with the part that was watched")
KUAIREC_SMALL = _kuairec("small", "4.7 million views: nearly every pair of 1,411 users and 3,327 videos")
