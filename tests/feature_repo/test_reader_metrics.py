from __future__ import annotations

import pytest
from prometheus_client import CollectorRegistry, generate_latest

from feature_repo.reader_metrics import ReaderMetrics


def test_a_serving_process_shows_them_in_its_own_registry() -> None:
    registry = CollectorRegistry()
    metrics = ReaderMetrics(registry)
    metrics.read({"fresh": 99, "late": 1}, 2, 0.0012)
    metrics.refuse()
    shown = generate_latest(registry).decode()
    for line in (
        "vql_reader_reads_total 1.0",
        'vql_reader_users_total{outcome="fresh"} 99.0',
        'vql_reader_users_total{outcome="late"} 1.0',
        "vql_reader_unknown_items_total 2.0",
        "vql_reader_refused_total 1.0",
        'vql_reader_read_seconds_bucket{le="0.001"} 0.0',
        'vql_reader_read_seconds_bucket{le="0.002"} 1.0',
    ):
        assert line in shown.splitlines()


def test_by_itself_each_has_a_registry_of_its_own_and_one_registry_holds_one() -> None:
    assert ReaderMetrics().registry is not ReaderMetrics().registry
    registry = CollectorRegistry()
    registry.register(ReaderMetrics().registry)
    assert b"vql_reader_reads_total 0.0" in generate_latest(registry)
    ReaderMetrics(registry := CollectorRegistry())
    with pytest.raises(ValueError, match="Duplicated"):
        ReaderMetrics(registry)
