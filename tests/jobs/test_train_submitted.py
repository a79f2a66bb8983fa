"""`vql train` as a Spark application: handed to spark-submit, its work on a standalone cluster's executors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jobs.jars import delta_jars
from jobs.local_cluster import SOURCES, SPARK_HOME, running_cluster
from models.checkpoint import open_checkpoint
from tests.jobs.tiny import TRAIN_OPTIONS, Shop


@pytest.mark.spark
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_cluster_makes_the_examples_and_the_checkpoint_is_the_one_of_a_local_master(
    shop: Shop, tmp_path: Path
) -> None:
    train = ["train", "--log", shop.log, *TRAIN_OPTIONS, "--work", tmp_path / "work"]
    (tmp_path / "cluster").mkdir()
    with running_cluster(tmp_path / "cluster", memory_mb=512) as cluster:
        submit = [SPARK_HOME / "bin" / "spark-submit", "--master", cluster.master, "--driver-memory", "1g"]
        submit += ["--jars", ",".join(map(str, delta_jars())), SOURCES / "jobs" / "cli.py"]
        environment = os.environ | cluster.environment | {"PYSPARK_PYTHON": sys.executable}
        environment["VQL_CHECKPOINT_CACHE"] = str(tmp_path / "cache")
        command = [str(part) for part in [*submit, *train, "--checkpoint", (tmp_path / "bucket" / "c").as_uri()]]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # An executor of each worker has worked for the one application.
        assert len(list((tmp_path / "cluster" / "work").glob("app-*/*"))) == 2
    made = open_checkpoint(tmp_path / "bucket" / "c")
    assert made.checkpoint_id == open_checkpoint(shop.checkpoint).checkpoint_id
    assert made.checkpoint_id in done.stdout
