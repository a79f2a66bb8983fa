"""Requests that schemathesis makes from /openapi.json, sound and broken ones: every answer is as the schema says."""

from __future__ import annotations

from collections import Counter

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from tests.jobs.serving.processes import Server

pytestmark = pytest.mark.slow

MANY = settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))


@pytest.mark.parametrize("path", ["/rank", "/healthz", "/readyz", "/metrics"])
def test_every_answer_is_as_the_schema_says(server: Server, path: str) -> None:
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    (operation,) = (found.ok() for found in schema.include(path=path).get_all_operations())
    statuses: Counter[int] = Counter()

    @MANY
    @given(st.one_of(*(operation.as_strategy(generation_mode=mode) for mode in GenerationMode)))
    def ask(case: schemathesis.Case) -> None:
        statuses[case.call_and_validate().status_code] += 1

    ask()
    # Sound requests and broken ones, or the check has looked at one kind alone.
    assert {200, 422} <= statuses.keys() or path != "/rank"
