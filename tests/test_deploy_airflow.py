"""The example of a DAG, read without Airflow: it parses, its commands are those of `vql`, its order is a release's."""

from __future__ import annotations

import ast
import re
import shlex

import pytest

from tests.deployed import DEPLOY, documents, fault_of_vql

SOURCE = (DEPLOY / "airflow/vql_nightly.py").read_text()
# What Airflow puts in the place of its templates.
TEMPLATES = {
    "ds_nodash": "20260101",
    "data_interval_start.int_timestamp": "1767225600",
    "params.stream": "vql-stream-green",
}
ORDER = ["train", "encode_items", "add", "gate", "backfill", "stream", "shadow", "watch", "audit", "promote"]


def tasks(source: str) -> dict[str, dict[str, object]]:
    """The literal arguments of each operator, by the name that it is assigned to."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        call = node.value if isinstance(node, ast.Assign) else getattr(node, "value", None)
        if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "BashOperator":
            arguments = {k.arg: ast.literal_eval(k.value) for k in call.keywords if k.arg != "execution_timeout"}
            found[node.targets[0].id] = arguments
    return found


def commands(source: str) -> list[list[str]]:
    """Each command of the tasks, with the templates filled in. Raises KeyError for a template that is not known."""
    filled = [re.sub(r"{{ ([\w.]+) }}", lambda m: TEMPLATES[m[1]], t["bash_command"]) for t in tasks(source).values()]
    assert not any("{" in line for line in filled)
    return [shlex.split(part) for line in filled for part in line.split("&&")]


def faults(source: str) -> list[str]:
    found = [fault_of_vql(line[1:]) for line in commands(source) if line[0] == "vql"]
    return [fault for fault in found if fault]


def test_every_command_is_one_of_vql() -> None:
    assert {line[0] for line in commands(SOURCE)} == {"vql", "kubectl", "sleep"}
    assert faults(SOURCE) == []
    assert sum(line[0] == "vql" for line in commands(SOURCE)) == 8


def test_tasks_are_named_as_they_are_and_follow_one_another() -> None:
    assert {name: task["task_id"] for name, task in tasks(SOURCE).items()} == {name: name for name in ORDER}
    (chain,) = re.findall(r"^    (train >> .*)$", SOURCE, re.MULTILINE)
    assert chain.split(" >> ") == ORDER


def test_what_is_refused_or_promoted_is_not_tried_again() -> None:
    assert {name for name, task in tasks(SOURCE).items() if task.get("retries") == 0} == {
        "gate",
        "watch",
        "audit",
        "promote",
    }


def test_the_training_leaves_what_the_gate_asks_and_all_name_one_checkpoint() -> None:
    train = tasks(SOURCE)["train"]["bash_command"]
    assert "--before-ms {{ data_interval_start.int_timestamp }}000" in train
    named = set(re.findall(r"/checkpoint/([\w{]+)", SOURCE)) - {"releases"}
    assert named == {"{{"}
    assert "CHECKPOINT={{ ds_nodash }}" in SOURCE


def test_the_stream_that_is_started_is_a_manifests() -> None:
    (second,) = documents(DEPLOY / "kubernetes/green/kustomization.yaml")
    assert f"vql-stream{second['nameSuffix']}" == TEMPLATES["params.stream"]
    assert f'params={{"stream": "{TEMPLATES["params.stream"]}"}}' in SOURCE


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (("--codebook relearn", "--codewords some"), "Invalid value for '--codewords'"),
        (("--store-sample", "--sample"), "No such option: --sample"),
        (("release promote", "release publish"), "no command release publish"),
        (("--releases /checkpoint/releases --state /state", "--state /state"), "Missing option '--releases'"),
    ],
)
def test_a_wrong_command_is_found(change: tuple[str, str], words: str) -> None:
    """The negative control of the tests above."""
    (fault, *_) = faults(SOURCE.replace(*change))
    assert words in fault
