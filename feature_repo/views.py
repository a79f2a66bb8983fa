"""What Feast is told: the entity `user`, and for each checkpoint a view of its rows and a service for its ranker.

A checkpoint has its own view, so two can be served side by side while traffic moves from one to the other.
"""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

from feast import Entity, FeatureService, FeatureView, Field, FileSource, PushSource, ValueType
from feast.types import Bytes, String

from feature_repo.online_store import CHECKPOINT_TAG, FEATURES
from models.errors import InputError

USER = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING, description="Whose behaviour it is")


def declare(checkpoint_id: str) -> list[Entity | PushSource | FeatureView | FeatureService]:
    """The Feast objects of one checkpoint. Raises InputError while VQL_STATE is not set.

    Feast 0.67 lets a view be written only if it has a batch source: a Parquet file of rows (user_id, folded, recent,
    event_timestamp) which nothing makes by itself; `feast materialize` loads one that was put there.
    """
    source = PushSource(
        name=push_source_name(checkpoint_id),
        batch_source=FileSource(
            name=f"{view_name(checkpoint_id)}_file",
            path=str(state_path() / "exports" / f"{checkpoint_id}.parquet"),
            timestamp_field="event_timestamp",
        ),
    )
    view = FeatureView(
        name=view_name(checkpoint_id),
        entities=[USER],
        ttl=timedelta(0),
        schema=[Field(name="user_id", dtype=String), *(Field(name=name, dtype=Bytes) for name in FEATURES)],
        source=source,
        tags={CHECKPOINT_TAG: checkpoint_id},
        description="The per-codeword cache of a user's history and the newest events beside it",
    )
    service = FeatureService(name=service_name(checkpoint_id), features=[view], tags={CHECKPOINT_TAG: checkpoint_id})
    return [USER, source, view, service]


def view_name(checkpoint_id: str) -> str:
    return f"history_{checkpoint_id[:12]}"


def push_source_name(checkpoint_id: str) -> str:
    return f"history_{checkpoint_id[:12]}_push"


def service_name(checkpoint_id: str) -> str:
    return f"ranker_{checkpoint_id[:12]}"


def state_path() -> Path:
    """The state folder that VQL_STATE names. Raises InputError."""
    value = os.environ.get("VQL_STATE", "")
    if not Path(value).is_absolute():
        raise InputError(f"VQL_STATE is {value!r}: set it to the absolute path of the state folder")
    return Path(value)
