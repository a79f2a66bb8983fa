from __future__ import annotations

import pytest
from feast import Entity, FeatureService, FeatureView, PushSource
from feast.types import Bytes, String

from feature_repo.online_store import checkpoint_of
from feature_repo.views import declare, push_source_name, service_name, state_path, view_name
from models.errors import InputError

A, B = "a" * 32, "b" * 32


def test_a_checkpoint_is_declared_as_one_entity_view_source_and_service(state):
    entity, source, view, service = declare(A)
    assert isinstance(entity, Entity)
    assert isinstance(source, PushSource)
    assert isinstance(view, FeatureView)
    assert isinstance(service, FeatureService)
    assert (entity.name, entity.join_key) == ("user", "user_id")
    assert (source.name, view.name, service.name) == (push_source_name(A), view_name(A), service_name(A))
    assert [(f.name, f.dtype) for f in view.features] == [("folded", Bytes), ("recent", Bytes)]
    assert [(f.name, f.dtype) for f in view.entity_columns] == [("user_id", String)]
    assert view.name == "history_aaaaaaaaaaaa"


def test_the_store_finds_the_whole_checkpoint_id_in_the_view(state):
    assert [checkpoint_of(declare(c)[2]) for c in (A, B)] == [A, B]


def test_two_checkpoints_share_the_entity_and_nothing_else(state):
    first, second = declare(A), declare(B)
    assert first[0] == second[0]
    assert {x.name for x in first[1:]}.isdisjoint({x.name for x in second[1:]})


def test_the_same_checkpoint_is_always_declared_alike(state):
    assert declare(A) == declare(A)


@pytest.mark.parametrize("value", [None, "", "state", "./state"])
def test_a_state_folder_that_is_not_set_or_relative_is_refused(monkeypatch, value):
    if value is None:
        monkeypatch.delenv("VQL_STATE", raising=False)
    else:
        monkeypatch.setenv("VQL_STATE", value)
    with pytest.raises(InputError, match=r"VQL_STATE is .*: set it to the absolute path"):
        state_path()
    with pytest.raises(InputError, match="VQL_STATE"):
        declare(A)
