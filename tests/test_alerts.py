"""Alerts, dashboards and runbook against the metrics that the code exposes, as its own registries have them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import msgspec
import promql_parser
import pytest
import yaml
from prometheus_client import CollectorRegistry

from feature_repo.reader import ABSENT, DAMAGED, FOREIGN, FRESH, LATE, REGRESSED, Read
from feature_repo.reader_metrics import ReaderMetrics
from jobs.audit_report import AuditMetrics, AuditReport, SourceReport, Staleness
from jobs.read_log import ReadLogMetrics
from jobs.repair import Repaired
from jobs.scoring import Scored, Scores
from jobs.serving.app import _PROBLEMS
from jobs.serving.batches import Ranked
from jobs.serving.metrics import ServeMetrics
from models.event import REASONS
from pipelines.metrics import StreamMetrics
from pipelines.update import UpdateCounts
from tests.deployed import DEPLOY, RULES

DASHBOARDS = sorted(DEPLOY.glob("grafana/*.json"))
# Prometheus gives every series these.
SCRAPED = {"job", "instance"}
STATISTICS = {"rx_bytes": 1, "brokers": {"b": {"state": "UP", "rtt": {"p99": 1}}}, "topics": {"events": {}}}
STATISTICS["topics"]["events"]["partitions"] = {"0": {"fetchq_cnt": 1, "consumer_lag": 1}}
# For comparing with other tools, not for a plot; alerts count it.
NOT_PLOTTED = {"vql_stream_in_rows_offset"}


@lru_cache(maxsize=1)
def exposed() -> dict[str, list[dict[str, str]]]:
    """Each sample's labels, by name, of a stream, a ranker and an audit that have met everything."""
    stream = StreamMetrics()
    stream.begin({0: -1})
    stream.log_end(0, 9)
    stream.observe(UpdateCounts())
    stream.dead_letters(REASONS)
    stream.committed(0, 5)
    stream.kafka_statistics(0, json.dumps(STATISTICS))
    ranker = _ranker()
    found: dict[str, list[dict[str, str]]] = {}
    for registry in (stream.registry, ranker, _audit()):
        for sample in (sample for family in registry.collect() for sample in family.samples):
            found.setdefault(sample.name, []).append(dict(sample.labels))
    return found


def outcomes() -> set[str]:
    """What a reader says of users."""
    missing = {reason: reason for reason in (ABSENT, DAMAGED, FOREIGN, LATE)}
    read = Read(caches=None, missing=missing, stale={why: why for why in (REGRESSED,)})  # type: ignore[arg-type]
    late = Read(caches=None, missing={}, stale={LATE: LATE})  # type: ignore[arg-type]
    return {read.outcome(user) for user in (*missing, REGRESSED, FRESH)} | {late.outcome(LATE)}


def _ranker() -> CollectorRegistry:
    metrics = ServeMetrics()
    users = [Scored(scores=[0.0, 0.0], history=outcome, unknown=[1]) for outcome in outcomes()]
    ranked = Ranked(checkpoint_id="c", users=users, wait_s=0, read_s=0, score_s=0, batch_users=len(users))
    metrics.answered(ranked, 0.001)
    metrics.went_live("c")
    for status in (200, 500, *_PROBLEMS):
        metrics.requests.labels(status)
    for outcome in ("scored", "dropped", "failed"):
        metrics.shadow_requests.labels(outcome)
    metrics.shadowed(Scores(checkpoint_id="s", users=users, read_s=0, score_s=0), 0.001, [0.9])
    ReaderMetrics(metrics.registry).read(dict.fromkeys(outcomes(), 1), 1, 0.001)
    ReadLogMetrics(metrics.registry)
    return metrics.registry


def _audit() -> CollectorRegistry:
    stale = Staleness(fresh=1.0, quantile_s={"1.0": 0.0})
    numbers = {"reads": 1, "users": 1, "compared": 1, "bad": 0, "by_verdict": {}, "examples": []}
    source = SourceReport(**numbers, error_max=0.0, score_error_max=0.0, stale=stale, stale_event=stale)
    sources = {"reads": source, "store": source}
    report = AuditReport(checkpoint_id="c", log="log", log_version=0, sources=sources, repaired=Repaired())
    registry = CollectorRegistry()
    registry.register(AuditMetrics(report, 1.0))
    return registry


def alerts() -> list[dict[str, Any]]:
    return [rule for path in RULES for group in yaml.safe_load(path.read_text())["groups"] for rule in group["rules"]]


def plots() -> list[str]:
    boards = [msgspec.json.decode(path.read_bytes()) for path in DASHBOARDS]
    return [target["expr"] for board in boards for panel in board["panels"] for target in panel["targets"]]


def parsed(text: str) -> Any:
    return promql_parser.parse(text.replace("$__rate_interval", "5m"))


def below(expression: Any) -> list[Any]:
    found: list[Any] = []
    promql_parser.walk(expression, found.append)
    return found


def faults(text: str) -> list[str]:
    """What an expression names and the code does not expose: metrics, labels, values of labels."""
    expression = parsed(text)
    return [fault for each in below(expression) for fault in [*_selector_faults(each), *_grouping_faults(each)]]


def _selector_faults(each: Any) -> Iterator[str]:
    if not isinstance(each, promql_parser.VectorSelector):
        return
    if each.name not in exposed():
        yield f"no metric {each.name}"
        return
    for matcher in each.matchers.matchers:
        if matcher.name in SCRAPED:
            continue
        values = {labels.get(matcher.name) for labels in exposed()[each.name]} - {None}
        wanted = matcher.value.split("|") if matcher.op == promql_parser.MatchOp.Re else [re.escape(matcher.value)]
        yield from (
            f"no {each.name} with {matcher.name} {one}"
            for one in wanted
            if not any(re.fullmatch(one, value) for value in values)
        )


def _grouping_faults(each: Any) -> Iterator[str]:
    if isinstance(each, promql_parser.AggregateExpr) and each.modifier:
        known = set().union(*(_labels(s) for s in below(each.expr) if isinstance(s, promql_parser.VectorSelector)))
        yield from (f"no label {label}" for label in set(each.modifier.labels) - known)


def _labels(selector: Any) -> set[str]:
    return SCRAPED.union(*exposed().get(selector.name, []))


def labels_of(expression: Any) -> set[str]:
    """The labels of what comes out: those of an aggregation, the left side's of a comparison."""
    match expression:
        case promql_parser.AggregateExpr():
            return set(expression.modifier.labels) if expression.modifier else set()
        case promql_parser.BinaryExpr():
            return labels_of(expression.lhs) or labels_of(expression.rhs)
        case promql_parser.ParenExpr() | promql_parser.SubqueryExpr():
            return labels_of(expression.expr)
        case promql_parser.Call():
            if expression.func.name == "absent":
                return set()
            return set().union(*map(labels_of, expression.args)) - (
                {"le"} if "histogram" in expression.func.name else set()
            )
        case promql_parser.MatrixSelector():
            return _labels(expression.vector_selector)
        case promql_parser.VectorSelector():
            return _labels(expression)
    return set()


@pytest.mark.parametrize("alert", alerts(), ids=lambda alert: alert["alert"])
def test_an_alert_names_what_the_code_exposes(alert: dict[str, Any]) -> None:
    assert faults(alert["expr"]) == []
    said = " ".join(alert["annotations"].values())
    assert set(re.findall(r"\$labels\.(\w+)", said)) <= labels_of(parsed(alert["expr"]))
    assert alert["annotations"].keys() == {"summary", "remedy"}
    assert alert["labels"]["severity"] in ("page", "ticket")
    assert "for" not in alert or promql_parser.parse_duration(alert["for"])


def test_dashboards_name_what_the_code_exposes() -> None:
    assert len(plots()) > 30
    assert [fault for text in plots() for fault in faults(text)] == []


def test_every_metric_of_ours_is_plotted() -> None:
    plotted = {each.name for text in plots() for each in below(parsed(text)) if hasattr(each, "matchers")}
    families = {re.sub(r"_(bucket|sum|count)$", "", name) for name in plotted}
    ours = {name for name in exposed() if not name.endswith("_created")} - NOT_PLOTTED
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in ours} == families


def test_dashboards_have_names_and_variables_of_their_own() -> None:
    boards = [msgspec.json.decode(path.read_bytes()) for path in DASHBOARDS]
    assert {board["uid"] for board in boards} == {path.stem for path in DASHBOARDS}
    for board in boards:
        (query,) = (each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query")
        assert re.fullmatch(r"label_values\((\w+), job\)", query)[1] in exposed()
        assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
        assert all('{job=~"$job"' in target["expr"] for panel in board["panels"] for target in panel["targets"])


def test_every_alert_has_an_entry_of_the_runbook_and_every_entry_an_alert() -> None:
    entries = re.findall(
        r"^### (\w+)\n\n(.*?)(?=^##|\Z)", (DEPLOY / "RUNBOOK.md").read_text(), re.MULTILINE | re.DOTALL
    )
    names = [alert["alert"] for alert in alerts()]
    assert sorted(name for name, _ in entries) == sorted(names)
    assert len(set(names)) == len(names)
    for name, words in entries:
        assert re.findall(r"^\* \*\*(.*?)\*\*", words, re.MULTILINE) == ["Means", "Users notice", "Look", "Do"], name
        assert set(re.findall(r"\b(vql_\w+)", words)) <= exposed().keys() | _families(), name
        assert set(re.findall(r"\bVql\w+", words)) <= set(names), name


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("vql_stream_lag_days", ["no metric vql_stream_lag_days"]),
        ('vql_rank_users_total{history="lost"}', ["no vql_rank_users_total with history lost"]),
        ('vql_rank_requests_total{status=~"5..|7.."}', ["no vql_rank_requests_total with status 7.."]),
        ('vql_rank_requests_total{code="500"}', ["no vql_rank_requests_total with code 500"]),
        ("sum by (shard) (vql_stream_lag_events)", ["no label shard"]),
        ('sum by (le, job) (rate(vql_rank_seconds_bucket{stage="read", job="x"}[5m]))', []),
    ],
)
def test_what_the_code_does_not_expose_is_found(text: str, wanted: list[str]) -> None:
    """The negative control of the tests above."""
    assert faults(text) == wanted


def _families() -> set[str]:
    return {re.sub(r"_(bucket|total)$", "", name) for name in exposed()}
