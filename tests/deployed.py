"""What is in deploy/, for the tests of it: documents, containers, command lines, and what `vql` says to these."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml
from typer.exceptions import TyperException
from typer.main import get_command

from jobs.cli import app

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.rglob("*.yaml"))
KUBERNETES = [path for path in MANIFESTS if "kubernetes" in path.parts]
DOCUMENTS = sorted(DEPLOY.glob("*.md"))
RULES = sorted(DEPLOY.glob("prometheus/*.rules.yml"))
OURS = ("vql-stream", "vql-trainer")


@lru_cache
def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def all_documents() -> list[dict[str, Any]]:
    return [document for path in KUBERNETES for document in documents(path)]


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Everything in the tree that runs an image: containers of pods, services of compose."""
    if isinstance(node, dict):
        for name, each in node.get("services", {}).items():
            yield {"name": name} | each
        for kind in ("initContainers", "containers"):
            yield from node.get(kind, [])
        for below in node.values():
            yield from containers(below)
    elif isinstance(node, list):
        for below in node:
            yield from containers(below)


def all_containers() -> list[dict[str, Any]]:
    return [found for path in MANIFESTS for document in documents(path) for found in containers(document)]


def our_containers() -> list[dict[str, Any]]:
    return [found for found in all_containers() if found.get("image", "").split(":")[0] in OURS]


def command_line(container: dict[str, Any]) -> list[str]:
    """What follows `vql`; compose says command where Kubernetes says args."""
    return container["args"] if "args" in container else container["command"]


def spark_applications() -> list[dict[str, Any]]:
    """The specs of Spark's operator, scheduled or not."""
    specs = {"SparkApplication": lambda spec: spec, "ScheduledSparkApplication": lambda spec: spec["template"]}
    return [specs[each["kind"]](each["spec"]) for each in all_documents() if each["kind"] in specs]


def fault_of_vql(line: list[str]) -> str | None:
    """What `vql` has against a command line, before it would run it; None: nothing."""
    command: Any = get_command(app)
    name, line = "vql", list(line)
    while hasattr(command, "commands"):
        if not line or line[0] not in command.commands:
            return f"no command {name} {' '.join(line[:1])}"
        name, command, line = line[0], command.commands[line[0]], line[1:]
    try:
        command.make_context(name, line)
    except TyperException as error:
        return error.format_message()
    return None


def written_commands(text: str) -> list[list[str]]:
    """The `vql` lines of a document's blocks, whatever they are handed to; what has ... in it is no whole line."""
    blocks = "\n".join(re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).replace("\\\n", " ")
    lines = re.findall(r"^vql (.*)$", blocks, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines if "..." not in line]


def mentioned_commands(text: str) -> list[list[str]]:
    """The `vql` commands within sentences."""
    return [shlex.split(words) for words in re.findall(r"`vql ([^`]+)`", text.replace("\n", " "))]
