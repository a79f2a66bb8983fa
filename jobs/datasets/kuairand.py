"""KuaiRand-1K and a part of KuaiRand-Pure: what the short-video app Kuaishou showed, and what was clicked.

Every exposure is an event. Its action says what came of it: "impression" where is_click is 0, else the strongest of
"click", "long_view" and "like", so that exactly the clicks are positives. (Three likes in a thousand come without a
click; they count as impressions.) KuaiRand-1K has three logs with the same columns: two of the standard feed, which
follow each other in time, and one of the exposures that were replaced by random videos, in the time of the second.
Videos have tags with commas between, which become a category (the first) and tags, and a duration in milliseconds.

The part of KuaiRand-Pure has each user's last items before a day, oldest first and at most 50, and the exposures after
it. Of those items only the order and the last one's time are known: the others are placed a second apart before it.
Their actions, "prior_watch", "prior_long_view" and "prior_like", are no impressions, and so never candidates. Histories
are of these alone: how often a user has clicked within the two weeks is what is asked, and of a user's exposures the
clicked ones have fewer clicks before them than the others. Some exposures are there twice, row by row the same; the
second goes to the quarantine.

Terms: CC BY-SA 4.0. Gao et al., "KuaiRand: An Unbiased Sequential Recommendation Dataset with Randomly Exposed
Videos", CIKM 2022, arXiv 2208.08696.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from jobs.datasets.dataset import DataSet, Read, SourceFile

if TYPE_CHECKING:
    from pyspark.sql import DataFrame

LOG_COLUMNS = ("user_id", "video_id", "time_ms", "is_click", "is_like", "long_view")
SHOWN, CLICKED = ("impression",), ("click", "long_view", "like")
PRIOR = ("prior_watch", "prior_long_view", "prior_like")
ACTION = (
    "CASE WHEN int(is_click) = 0 THEN 'impression' WHEN int(is_like) = 1 THEN 'like' "
    "WHEN int(long_view) = 1 THEN 'long_view' ELSE 'click' END"
)
ITEM_COLUMNS = {
    "category": "element_at(split(tag, ','), 1)",
    "tags": "replace(tag, ',', '|')",
    "author": "author_id",
    "video_type": "video_type",
    "music": "music_id",
    "duration": "video_duration",
}
FIELDS = ("category", "author")
TERMS = "CC BY-SA 4.0, from its authors (kuairand.com); not part of this package"


def _all_logs(read: Read) -> DataFrame:
    logs = [read(role).select(*LOG_COLUMNS) for role in ("log_before", "log", "log_random")]
    return logs[0].unionByName(logs[1]).unionByName(logs[2])


KUAIRAND_1K = DataSet(
    name="kuairand_1k",
    about="11.7 million exposures of 4.4 million videos to 1,000 users in a month, with clicks",
    terms=TERMS,
    files={
        "log_before": SourceFile(name="log_standard_4_08_to_4_21_1k.csv", columns=LOG_COLUMNS),
        "log": SourceFile(name="log_standard_4_22_to_5_08_1k.csv", columns=LOG_COLUMNS),
        "log_random": SourceFile(name="log_random_4_22_to_5_08_1k.csv", columns=LOG_COLUMNS),
        "items": SourceFile(
            name="video_features_basic_1k.csv",
            columns=("video_id", "author_id", "video_type", "music_id", "video_duration", "tag"),
        ),
    },
    events=_all_logs,
    columns={
        "event_id": "concat_ws('-', user_id, video_id, time_ms)",
        "user_id": "user_id",
        "item_id": "video_id",
        "action": ACTION,
        "event_time_ms": "time_ms",
    },
    items=lambda read: read("items"),
    item_columns={"item_id": "video_id", **ITEM_COLUMNS},
    fields=FIELDS,
    shown=SHOWN,
    clicked=CLICKED,
)


def _prior_and_tail(read: Read) -> DataFrame:
    prior = read("prior").selectExpr("*", "posexplode(watch_seq) AS (place, item_id)")
    prior = prior.selectExpr(
        "concat_ws('-', 'prior', user_id, place) AS event_id",
        "user_id",
        "int(item_id) AS item_id",
        "CASE WHEN array_contains(like_seq, item_id) THEN 'prior_like' "
        "WHEN array_contains(long_watch_seq, item_id) THEN 'prior_long_view' ELSE 'prior_watch' END AS action",
        "last_time_ms - 1000L * (size(watch_seq) - 1 - place) AS event_time_ms",
    )
    tail = read("events").selectExpr(
        "concat_ws('-', user_id, item_id, ts) AS event_id", "user_id", "item_id", f"{ACTION} AS action", "ts"
    )
    return prior.unionByName(tail.withColumnRenamed("ts", "event_time_ms"))


KUAIRAND_PURE = DataSet(
    name="kuairand_pure",
    about="228,000 exposures of 7,583 videos to 25,156 users in two weeks, with clicks, and up to 50 items before them",
    terms=TERMS,
    files={
        "events": SourceFile(
            name="kuairand_pure_tail_events.parquet",
            columns=("user_id", "item_id", "ts", "is_click", "is_like", "long_view"),
            format="parquet",
        ),
        "prior": SourceFile(
            name="kuairand_pure_prior_sequences.parquet",
            columns=("user_id", "last_time_ms", "watch_seq", "like_seq", "long_watch_seq"),
            format="parquet",
        ),
        "items": SourceFile(
            name="kuairand_pure_items.parquet",
            columns=("item_id", "author_id", "video_type", "music_id", "video_duration", "tag"),
            format="parquet",
        ),
    },
    events=_prior_and_tail,
    columns={},
    items=lambda read: read("items"),
    item_columns={"item_id": "item_id", **ITEM_COLUMNS},
    fields=FIELDS,
    shown=SHOWN,
    clicked=CLICKED,
    remembered=PRIOR,
)
