"""What the README promises can be checked: its file tree, its commands, its figures' homes."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
from typer.main import get_command

from jobs.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGES = ("models", "feature_repo", "pipelines", "jobs")


@pytest.mark.parametrize("package", PACKAGES)
def test_the_file_tree_names_every_source_and_no_other(package):
    section = re.search(rf"^{package}/.*?(?=^\S)", README, re.MULTILINE | re.DOTALL)
    assert section is not None
    named = set(re.findall(r"\b(\w+\.py)\b", section[0]))
    present = {path.name for path in (ROOT / package).rglob("*.py")} - {"__init__.py"}
    assert named == present


def test_every_command_in_the_documents_exists():
    known = set(get_command(app).commands)
    for name in ("README.md", "DESIGN.md", "CHANGELOG.md"):
        mentioned = set(re.findall(r"`(?:\.venv/bin/)?vql ([a-z-]+)", (ROOT / name).read_text()))
        assert mentioned - {"--help"} <= known, name


def test_every_make_target_in_the_readme_exists():
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make (demo|test|check|\w+)(?=[ `]+(?:#|runs|\())", README)) <= targets
    assert {"demo", "test", "check"} <= targets


def test_the_files_that_the_documents_name_are_there():
    for name in ("README.md", "DESIGN.md"):
        for path in re.findall(
            r"`((?:models|feature_repo|pipelines|jobs|tests|deploy)/[\w/.]+)`", (ROOT / name).read_text()
        ):
            assert (ROOT / path).exists(), f"{name} names {path}"


def test_no_tracked_file_holds_an_address_of_a_registry_or_a_path_of_one_machine():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    hosts = "|".join(["py" + r"pi\.org", "python" + "hosted", "mav" + r"en\.org", "/wo" + "rk/", "/ro" + "ot/"])
    for name in tracked:
        path = ROOT / name
        if path.is_file():
            assert not re.search(hosts, path.read_bytes().decode(errors="replace")), name
