from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pandas as pd
import pytest
from feast import Entity, FeatureView, Field, RepoConfig, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Bytes, Int64, String

from feature_repo.online_store import FencedOnlineStore, checkpoint_of
from feature_repo.repo import register, rows_of
from feature_repo.store import RowPut
from feature_repo.views import push_source_name, service_name, view_name
from models.errors import ForeignRowError, InputError, WireError
from models.row import encode_row, new_row
from models.wire import recent_times
from tests.feature_repo.rows import put_all, small_rows


@pytest.fixture
def registered(chosen, feast, checkpoint, other_checkpoint):
    register(feast, checkpoint.checkpoint_id)
    register(feast, other_checkpoint.checkpoint_id)
    return feast


def frame(rows):
    data = [encode_row(row) for row in rows.values()]
    return pd.DataFrame(
        {
            "user_id": list(rows),
            "folded": [d.folded for d in data],
            "recent": [d.recent for d in data],
            "event_timestamp": datetime.now(UTC),
        }
    )


def read(feast, checkpoint, user_ids, features=None):
    view = feast.get_feature_view(view_name(checkpoint.checkpoint_id))
    keys = [EntityKey(join_keys=["user_id"], entity_values=[Value(string_val=u)]) for u in user_ids]
    return feast.provider.online_store.online_read(feast.config, view, keys, features)


def write(feast, checkpoint, rows, way, state):
    """Hand rows to Feast in one of the three ways it has of writing."""
    view, day = view_name(checkpoint.checkpoint_id), timedelta(days=1)
    if way == "push":
        feast.push(push_source_name(checkpoint.checkpoint_id), frame(rows))
    elif way == "write":
        feast.write_to_online_store(view, frame(rows))
    else:
        (state / "exports").mkdir(exist_ok=True)
        frame(rows).to_parquet(state / "exports" / f"{checkpoint.checkpoint_id}.parquet")
        feast.materialize(datetime.now(UTC) - day, datetime.now(UTC) + day, [view])


@pytest.mark.parametrize("way", ["push", "write", "materialize"])
def test_what_feast_writes_goes_through_the_fence(registered, checkpoint, fold, state, way):
    newer, older = small_rows(checkpoint, fold, 400), small_rows(checkpoint, fold, 200)
    assert set(older) == set(newer)
    for written, kept in ((older, older), (newer, newer), (older, newer)):
        write(registered, checkpoint, written, way, state)
        stored = rows_of(registered).get_rows(checkpoint.checkpoint_id, list(kept))
        assert stored == [encode_row(row) for row in kept.values()]


def test_feasts_own_reading_gives_the_bytes_of_the_store(registered, checkpoint, fold):
    stored = small_rows(checkpoint, fold, 200)
    put_all(rows_of(registered), checkpoint, stored)
    service = registered.get_feature_service(service_name(checkpoint.checkpoint_id))
    users = [{"user_id": user_id} for user_id in [*stored, "nobody"]]
    answer = registered.get_online_features(service, users).to_dict()
    assert answer["folded"] == [*(encode_row(row).folded for row in stored.values()), None]
    assert answer["recent"] == [*(encode_row(row).recent for row in stored.values()), None]


def test_the_event_time_is_that_of_the_users_newest_event(registered, checkpoint, fold):
    stored = small_rows(checkpoint, fold, 400)
    put_all(rows_of(registered), checkpoint, stored)
    found = read(registered, checkpoint, list(stored))
    for row, (time, values) in zip(stored.values(), found, strict=True):
        newest_ms = max(row.folded.reference_ms, int(recent_times(row.recent).max()))
        assert time == datetime.fromtimestamp(newest_ms / 1000, UTC)
        assert values["folded"].bytes_val == encode_row(row).folded


def test_only_the_requested_features_come_back(registered, checkpoint, fold):
    stored = small_rows(checkpoint, fold, 50)
    put_all(rows_of(registered), checkpoint, stored)
    ((_, values),) = read(registered, checkpoint, ["u0"], ["recent"])
    assert list(values) == ["recent"]


def test_an_absent_user_has_neither_time_nor_values(registered, checkpoint):
    assert read(registered, checkpoint, ["nobody", "nil"]) == [(None, None), (None, None)]


def test_a_damaged_row_is_served_as_it_is_and_does_not_disturb_the_others(registered, checkpoint, fold):
    stored = small_rows(checkpoint, fold, 100)
    rows = rows_of(registered)
    put_all(rows, checkpoint, stored)
    stamp = stored["u0"].stamp
    bad = RowPut(user_id="bad", stamp=stamp, recent=b"x", folded=b"y")
    assert rows.put_rows(checkpoint.checkpoint_id, [bad]) == [True]
    (bad_time, bad_values), (_, good_values) = read(registered, checkpoint, ["bad", "u0"])
    assert bad_time == datetime(1970, 1, 1, tzinfo=UTC)
    assert bad_values["recent"].bytes_val == b"x"
    assert good_values["recent"].bytes_val == encode_row(stored["u0"]).recent


def test_bytes_that_are_no_row_of_the_checkpoint_are_not_written(registered, checkpoint, other_checkpoint, fold):
    foreign = {"u0": new_row(other_checkpoint.spec, 0, 0)}
    source = push_source_name(checkpoint.checkpoint_id)
    with pytest.raises(ForeignRowError):
        registered.push(source, frame(foreign))
    with pytest.raises(WireError):
        registered.push(source, frame(small_rows(checkpoint, fold, 10)).assign(recent=b"nonsense"))
    assert rows_of(registered).get_rows(checkpoint.checkpoint_id, ["u0"]) == [None]


def test_half_a_row_is_refused(registered, checkpoint, fold):
    data = frame(small_rows(checkpoint, fold, 200))
    data.loc[0, "folded"] = None
    with pytest.raises(InputError, match=r"features \['folded'\] are missing"):
        registered.push(push_source_name(checkpoint.checkpoint_id), data)


def test_removing_a_view_erases_its_checkpoint_and_no_other(registered, checkpoint, other_checkpoint, fold):
    rows = rows_of(registered)
    put_all(rows, checkpoint, small_rows(checkpoint, fold, 100))
    put_all(rows, other_checkpoint, small_rows(other_checkpoint, other_checkpoint.fold(), 100))
    rows.commit_positions(checkpoint.checkpoint_id, 0, {0: 99})
    view = registered.get_feature_view(view_name(checkpoint.checkpoint_id))
    registered.apply([], objects_to_delete=[view], partial=False)
    assert rows.get_rows(checkpoint.checkpoint_id, ["u0"]) == [None]
    assert rows.positions(checkpoint.checkpoint_id) == {}
    assert rows.get_rows(other_checkpoint.checkpoint_id, ["u0"]) != [None]


def test_registering_again_erases_nothing(registered, checkpoint, fold):
    rows = rows_of(registered)
    put_all(rows, checkpoint, small_rows(checkpoint, fold, 100))
    register(registered, checkpoint.checkpoint_id)
    assert rows.get_rows(checkpoint.checkpoint_id, ["u0"]) != [None]


def test_teardown_erases_the_store_and_a_new_one_can_follow(registered, chosen, checkpoint, fold, state):
    put_all(rows_of(registered), checkpoint, small_rows(checkpoint, fold, 100))
    assert (state / "online.db").exists() == (chosen == "sqlite")
    registered.teardown()
    assert [p.name for p in state.iterdir() if p.name.startswith("online")] == []
    assert rows_of(registered).get_rows(checkpoint.checkpoint_id, ["u0"]) == [None]


@pytest.mark.parametrize(
    ("fields", "tags"),
    [
        ([("folded", Bytes), ("recent", Bytes)], {}),
        ([("folded", Bytes)], {"checkpoint_id": "c"}),
        ([("folded", Bytes), ("recent", Bytes), ("clicks", Int64)], {"checkpoint_id": "c"}),
    ],
)
def test_a_view_of_another_kind_is_refused(fields, tags):
    user = Entity(name="user", join_keys=["user_id"], value_type=ValueType.STRING)
    schema = [Field(name="user_id", dtype=String), *(Field(name=n, dtype=t) for n, t in fields)]
    view = FeatureView(name="clicks_view", entities=[user], schema=schema, tags=tags)
    with pytest.raises(InputError, match="clicks_view"):
        checkpoint_of(view)


def test_an_entity_that_is_no_user_is_refused(registered, checkpoint):
    view = registered.get_feature_view(view_name(checkpoint.checkpoint_id))
    for key in (
        EntityKey(join_keys=["item_id"], entity_values=[Value(string_val="u")]),
        EntityKey(join_keys=["user_id"], entity_values=[Value(int64_val=7)]),
    ):
        with pytest.raises(InputError, match="user_id"):
            registered.provider.online_store.online_read(registered.config, view, [key])


@pytest.mark.parametrize("path", ["${VQL_STATE}/online.db", "online.db"])
def test_a_configuration_whose_variable_is_not_set_is_refused(tmp_path, path):
    kind = f"{FencedOnlineStore.__module__}.{FencedOnlineStore.__name__}"
    with pytest.raises(InputError, match="VQL_STATE"):
        RepoConfig(project="p", registry=str(tmp_path / "r.db"), online_store={"type": kind, "path": path})
