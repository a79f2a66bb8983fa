"""MovieLens, and any CSV like it: a row for each rating with user, item, rating and seconds, and a row for each movie.

Other names of files and columns are given when it is prepared (--file, --column, --item-column). A rating of 4 or
more is a "like". `timestamp` is in seconds; genres have "|" between.

Terms: those of GroupLens, for research; to be fetched there by oneself.
"""

from __future__ import annotations

from jobs.datasets.dataset import DataSet, SourceFile

MOVIELENS = DataSet(
    name="movielens",
    about="ratings.csv and movies.csv of MovieLens (20M, 25M, 32M, latest), or CSV files like them",
    terms="the terms of GroupLens (grouplens.org/datasets); not part of this package",
    files={"events": SourceFile(name="ratings.csv"), "items": SourceFile(name="movies.csv")},
    events=lambda read: read("events"),
    columns={
        "event_id": "concat_ws('-', userId, movieId, timestamp)",
        "user_id": "userId",
        "item_id": "movieId",
        "action": "if(double(rating) >= 4, 'like', 'rating')",
        "event_time_ms": "bigint(timestamp) * 1000",
    },
    items=lambda read: read("items"),
    item_columns={"item_id": "movieId", "category": "element_at(split(genres, '[|]'), 1)", "tags": "genres"},
    fields=("category",),
)
