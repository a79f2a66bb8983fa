"""gitlog: who changed which file of seventeen public repositories, from their commit histories.

One event is one file of a commit; its time is the author's, and the files of a commit share it. A file belongs to one
repository, and negatives are drawn within it: which repository somebody works in is no question.
"""

from __future__ import annotations

from jobs.datasets.dataset import DataSet, SourceFile

EVENTS_FILE, ITEMS_FILE = "gitlog_events.parquet", "gitlog_items.parquet"
# By the number that the file has for them.
ACTIONS = ("added", "modified", "deleted", "renamed")

GITLOG = DataSet(
    name="gitlog",
    about="1.0 million changes of files by 13,464 authors of 17 repositories, up to 19,948 of one author",
    terms="made from public repositories; not part of this package",
    files={
        "events": SourceFile(
            name=EVENTS_FILE,
            columns=("user_id", "item_id", "ts", "action", "commit_id", "commit_files"),
            format="parquet",
        ),
        "items": SourceFile(name=ITEMS_FILE, columns=("item_id", "category_name", "repo", "ext"), format="parquet"),
    },
    events=lambda read: read("events"),
    columns={
        "event_id": "concat('c', commit_id, '-', item_id)",
        "user_id": "concat('u', user_id)",
        "item_id": "concat('i', item_id)",
        "action": f"element_at(array{ACTIONS}, action + 1)",
        "event_time_ms": "ts",
        # A commit that touches many files says less about each.
        "weight": "1.0D / commit_files",
    },
    items=lambda read: read("items"),
    item_columns={
        "item_id": "concat('i', item_id)",
        "category": "category_name",
        "repo": "repo",
        "ext": "ext",
        # The folders on the file's path.
        "tags": "replace(element_at(split(category_name, ':'), -1), '/', '|')",
    },
    fields=("category", "repo", "ext"),
    within="repo",
)
