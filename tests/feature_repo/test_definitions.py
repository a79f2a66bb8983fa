"""`feast` as an operator runs it: the command line of the installed Feast on the packaged repo."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from feature_repo.handle import PACKAGED_REPO, StoreHandle
from feature_repo.views import view_name
from tests.feature_repo.subjects import stamp, whole

FEAST = Path(sys.executable).parent / "feast"


def run_feast(*arguments: str, **variables: object) -> subprocess.CompletedProcess[str]:
    unset = {"VQL_STATE", "VQL_CHECKPOINTS"}
    environment = {k: v for k, v in os.environ.items() if k not in unset} | {k: str(v) for k, v in variables.items()}
    command = [str(FEAST), "--chdir", str(PACKAGED_REPO), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300, check=False)


def test_feast_executes_the_definitions_and_nothing_else():
    from feast.repo_operations import get_repo_files

    assert get_repo_files(PACKAGED_REPO) == [(PACKAGED_REPO / "definitions.py").resolve()]


@pytest.mark.slow
def test_apply_registers_the_listed_checkpoints_and_erases_the_unlisted(tmp_path, checkpoint, other_checkpoint):
    state = tmp_path / "state"
    both = os.pathsep.join([str(checkpoint.path), str(other_checkpoint.path)])
    applied = run_feast("apply", VQL_STATE=state, VQL_CHECKPOINTS=both)
    assert applied.returncode == 0, applied.stderr
    ids = [checkpoint.checkpoint_id, other_checkpoint.checkpoint_id]
    listed = run_feast("feature-views", "list", VQL_STATE=state).stdout
    assert all(view_name(i) in listed for i in ids)
    assert "user" in run_feast("entities", "list", VQL_STATE=state).stdout

    rows = StoreHandle(state=state).open()
    for i in ids:
        rows.put_rows(i, [whole("u", stamp(1))])
    applied = run_feast("apply", VQL_STATE=state, VQL_CHECKPOINTS=checkpoint.path)
    assert applied.returncode == 0, applied.stderr
    assert rows.get_rows(ids[0], ["u"]) != [None]
    assert rows.get_rows(ids[1], ["u"]) == [None]


@pytest.mark.slow
def test_apply_without_checkpoints_is_refused_and_erases_nothing(tmp_path, checkpoint):
    rows = StoreHandle(state=tmp_path).open()
    rows.put_rows(checkpoint.checkpoint_id, [whole("u", stamp(1))])
    applied = run_feast("apply", VQL_STATE=tmp_path)
    assert applied.returncode != 0
    assert "VQL_CHECKPOINTS lists no checkpoint" in applied.stderr
    assert rows.get_rows(checkpoint.checkpoint_id, ["u"]) != [None]


@pytest.mark.slow
@pytest.mark.parametrize("variables", [{}, {"VQL_STATE": "state"}])
def test_apply_without_a_state_folder_is_refused_and_leaves_nothing_behind(checkpoint, variables):
    before = sorted(p.name for p in PACKAGED_REPO.iterdir())
    applied = run_feast("apply", VQL_CHECKPOINTS=checkpoint.path, **variables)
    assert applied.returncode != 0
    assert "VQL_STATE" in applied.stderr.splitlines()[-1]
    assert sorted(p.name for p in PACKAGED_REPO.iterdir()) == before
