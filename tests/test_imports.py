"""Imports run one way, models <- feature_repo <- {pipelines, jobs}, and each folder knows one foreign library."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("models", "feature_repo", "pipelines", "jobs")
FORBIDDEN = {
    "models": {"feature_repo", "pipelines", "jobs", "apache_beam", "pyspark", "delta", "deltalake", "feast"},
    "feature_repo": {"pipelines", "jobs", "apache_beam", "pyspark"},
    "pipelines": {"jobs", "pyspark", "torch"},
    "jobs": {"pipelines"},
}
# The command line starts both sides, and the demo shows both.
STARTS_BOTH = re.compile(r"jobs/(cli(_\w+)?|demo)\.py")
NAMES_THAT_SAY_NOTHING = {"utils.py", "common.py", "helpers.py", "base.py", "misc.py"}


def sources() -> list[str]:
    found = (path for folder in (*FOLDERS, "deploy", "tests") for path in (ROOT / folder).rglob("*.py"))
    return sorted(path.relative_to(ROOT).as_posix() for path in found)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """(line, top-level package) of every import, those inside functions too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name.split(".")[0]) for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.lineno, (node.module or "").split(".")[0]


def faults(path: str, source: str) -> list[str]:
    """What is wrong with the source of this path, each as "path:line: reason"."""
    folder, name = path.split("/")[0], path.split("/")[-1]
    found = []
    if folder == "deploy":
        # A scheduler's own language, and no code of ours.
        if not path.startswith("deploy/airflow/"):
            return [f"{path}:1: deploy/ holds no Python"]
        found += [f"{path}:{line}: imports {p}" for line, p in imports(source) if p not in ("airflow", "datetime")]
    if name in NAMES_THAT_SAY_NOTHING:
        found.append(f"{path}:1: the name says nothing")
    if folder not in FOLDERS:
        return found
    forbidden = set() if STARTS_BOTH.fullmatch(path) else set(FORBIDDEN[folder])
    forbidden |= {"pickle", "cloudpickle", "dill"} | (set() if path == "models/wire.py" else {"struct"})
    return found + [f"{path}:{line}: imports {package}" for line, package in imports(source) if package in forbidden]


def test_imports_run_one_way_and_files_say_what_they_hold():
    paths = sources()
    assert "models/wire.py" in paths
    assert [fault for path in paths for fault in faults(path, (ROOT / path).read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("path", "source", "wanted"),
    [
        ("models/cache.py", "def f():\n    import feast.online as o", ["models/cache.py:2: imports feast"]),
        ("models/a/b.py", "from jobs.train import x", ["models/a/b.py:1: imports jobs"]),
        ("models/cache.py", "import struct, pickle", [f"models/cache.py:1: imports {n}" for n in ("struct", "pickle")]),
        ("models/wire.py", "import struct", []),
        ("feature_repo/a.py", "\nfrom pyspark.sql import functions", ["feature_repo/a.py:2: imports pyspark"]),
        ("pipelines/a.py", "if 1:\n    import torch", ["pipelines/a.py:2: imports torch"]),
        ("jobs/train.py", "import pipelines.stream", ["jobs/train.py:1: imports pipelines"]),
        ("jobs/cli.py", "import pipelines.stream", []),
        ("jobs/cli_stream.py", "import pipelines.stream", []),
        ("jobs/a.py", "import torch, pyspark, models.cache, feature_repo.store, deltalake", []),
        ("deploy/a.py", "", ["deploy/a.py:1: deploy/ holds no Python"]),
        ("deploy/airflow/a.py", "import jobs.train", ["deploy/airflow/a.py:1: imports jobs"]),
        ("deploy/airflow/a.py", "from airflow.sdk import DAG", []),
        ("tests/jobs/utils.py", "import pickle", ["tests/jobs/utils.py:1: the name says nothing"]),
    ],
)
def test_a_planted_fault_is_found_with_its_path_and_line(path, source, wanted):
    assert faults(path, source) == wanted
