"""What can be checked of deploy/ without a container or a cluster: that it is well formed, and names what there is."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pyspark
import pytest
import yaml
from apache_beam.options.pipeline_options import PipelineOptions
from typer.main import get_command

from feature_repo.redis_settings import RedisSettings
from jobs.cli import app
from jobs.jars import KAFKA_VERSION
from pipelines.kafka_settings import KafkaSettings
from tests.deployed import (
    DEPLOY,
    DOCUMENTS,
    MANIFESTS,
    ROOT,
    all_containers,
    all_documents,
    command_line,
    documents,
    fault_of_vql,
    mentioned_commands,
    our_containers,
    spark_applications,
    written_commands,
)

DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
# Beam's job server for Flink tells the client of this one when it is asked; without it, it cannot be looked up.
FLINK_OPTIONS = {"--checkpointing_interval"}
# A pod template that only adds to the operator's own container has no image.
WITHOUT_IMAGE = {"flink-main-container"}


def lines() -> list[list[str]]:
    """Every command line of ours that a manifest starts."""
    found = [command_line(each) for each in our_containers() if "sleep" not in each.get("command", [])]
    found = [line for line in found if line != ["--service_port=50000"]]
    return found + [spec["arguments"] for spec in spark_applications()]


def streams() -> list[list[str]]:
    return [line for line in lines() if line[0] == "stream"]


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_yaml_and_says_that_it_was_not_tested(path: Path) -> None:
    assert path.read_text().startswith("# Not tested:")
    assert all(isinstance(document, dict) and document for document in documents(path))
    for document in documents(path) if "kubernetes" in path.parts else []:
        assert {"apiVersion", "kind"} <= document.keys()


def test_the_readme_names_every_file_and_says_what_was_not_tested() -> None:
    readme = (DEPLOY / "README.md").read_text()
    files = {path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file()} - {"README.md"}

    assert "**Not tested.**" in readme
    assert [name for name in files if f"`{name}`" not in readme] == []


def test_images_have_a_version() -> None:
    images = [found["image"] for found in all_containers() if found["name"] not in WITHOUT_IMAGE]
    images += [spec["image"] for spec in spark_applications()] + _flink_images()
    images += set(re.findall(r"(?:^FROM |--from=)(\S+)", DOCKERFILE, re.MULTILINE)) - {"build", "stream", "trainer"}

    assert len(images) > 20
    assert [image for image in images if not re.search(r":[\w.-]*\d[\w.-]*$", image)] == []


def test_versions_are_those_of_the_project() -> None:
    beam, ours = importlib.metadata.version("apache-beam"), importlib.metadata.version("vql-cache")
    images = {found["image"] for found in all_containers() if "image" in found}
    (flink,) = _flink_images()
    minor = re.search(r"flink:(\d+\.\d+)", flink)[1]
    uv = re.search(r"^UV := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]

    assert f"apache/beam_flink{minor}_job_server:{beam}" in images
    assert f"apache/kafka:{KAFKA_VERSION}" in images
    assert {f"vql-stream:{ours}", f"vql-trainer:{ours}"} <= images
    assert f"uv=={uv}" in DOCKERFILE
    assert f"--from=apache/spark:{pyspark.__version__}-" in DOCKERFILE


def test_applications_of_spark_have_what_an_image_of_ours_has() -> None:
    ours, delta = importlib.metadata.version("vql-cache"), importlib.metadata.version("delta-spark")
    installed = "local:///opt/vql/lib/python3.11/site-packages/"
    jars = f"/opt/jars/delta-{delta}-spark-{pyspark.__version__}/*"

    assert "ENV VQL_JARS=/opt/jars" in DOCKERFILE
    assert [spec["arguments"][0] for spec in spark_applications()] == ["backfill", "train", "encode-items"]
    for spec in spark_applications():
        assert (spec["image"], spec["sparkVersion"]) == (f"vql-spark:{ours}", pyspark.__version__)
        assert {spec["sparkConf"][f"spark.{role}.extraClassPath"] for role in ("driver", "executor")} == {jars}
        script = ROOT / spec["mainApplicationFile"].removeprefix(installed)
        # As spark-submit starts it: a file, whose own folder comes first among the modules.
        said = subprocess.run([sys.executable, script, spec["arguments"][0], "--help"], capture_output=True, text=True)
        assert said.returncode == 0, said.stderr
        assert f"Usage: cli.py {spec['arguments'][0]} " in said.stdout


def test_every_command_of_the_manifests_is_one_of_vql() -> None:
    assert {line[0] for line in lines()} == {"stream", "serve", "ingest", "train", "encode-items", "backfill", "audit"}
    assert len(streams()) == 3
    assert [fault for line in lines() if (fault := fault_of_vql(line))] == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_of_the_documents_is_one_of_vql(path: Path) -> None:
    text = path.read_text()
    commands = get_command(app).commands
    options = {option for each in _all_commands(commands) for parameter in each.params for option in parameter.opts}
    # Those of kubectl and Prism, and Spark's and Beam's own.
    options |= {"--replicas", "--tail", "--from", "--job_port", "--require-hashes", "--checkpointing_interval"}

    assert [fault for line in written_commands(text) if (fault := fault_of_vql(line))] == []
    for line in mentioned_commands(text):
        named = commands.get(line[0])
        assert named, line
        if line[1:] and hasattr(named, "commands"):
            assert set(re.split(r"\|", line[1])) <= named.commands.keys(), line
    assert set(re.findall(r"`(--[a-z][\w-]*)", text)) <= options


def test_the_runbook_and_the_upgrade_have_commands_to_check() -> None:
    """Else the test above could pass because nothing was found."""
    found = {line[0] for path in DOCUMENTS for line in written_commands(path.read_text())}
    assert {"doctor", "backfill", "train", "encode-items", "dead-letters", "inspect"} <= found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_what_the_documents_name_is_there(path: Path) -> None:
    text = path.read_text()
    named = {each["metadata"]["name"] for each in all_documents() if "metadata" in each}
    labels = {pod["app"] for pod in _pod_labels(all_documents())}
    settings = {f"VQL_REDIS_{name}".upper() for name in RedisSettings.model_fields}
    settings |= {f"VQL_KAFKA_{name}".upper() for name in KafkaSettings.model_fields}
    sources = "\n".join(each.read_text() for folder in ("jobs", "pipelines") for each in (ROOT / folder).rglob("*.py"))
    sources += (DEPLOY / "compose.yaml").read_text() + (DEPLOY / "redis/users.acl").read_text()

    objects = {name.removesuffix("-green") for name in re.findall(r"(?:statefulset|deployment|cronjob)/([\w-]+)", text)}
    assert objects <= named
    assert set(re.findall(r"-l app=([\w-]+)", text)) <= labels
    assert [name for name in re.findall(r"deploy/[\w/.-]*\w", text) if not (ROOT / name).exists()] == []
    assert [n for n in re.findall(r"\bVQL_[A-Z_0-9]+[A-Z0-9]", text) if n not in settings and n not in sources] == []
    assert [n for n in re.findall(r"\b[A-Z]{4,}\.md", text) if not ((DEPLOY / n).exists() or (ROOT / n).exists())] == []


def test_what_there_is_not_is_found() -> None:
    """The negative control of the tests above."""
    whole = ["stream", "--checkpoint=c", "--log=l", "--state=s"]

    assert fault_of_vql(whole) is None
    assert "No such option: --colour" in fault_of_vql([*whole, "--colour=red"])
    assert "Missing option '--state'" in fault_of_vql(whole[:-1])
    assert "Invalid value for '--drain'" in fault_of_vql([*whole, "--drain=soon"])
    assert fault_of_vql(["flow"]) == "no command vql flow"
    assert fault_of_vql(["dead-letters", "burn"]) == "no command dead-letters burn"
    assert written_commands("```\nvql a \\\n  --b  # c\nkubectl x\nvql ...\n```\nvql d\n") == [["a", "--b"]]


def test_beams_options_are_beams_and_flinks_checkpoints_are_set() -> None:
    given = [line[line.index("--") + 1 :] for line in streams() if "--" in line]

    assert len(given) == 1
    for options in given:
        names = {option.partition("=")[0] for option in options}
        known = PipelineOptions(options).get_all_options(drop_default=True)
        assert {name.removeprefix("--") for name in names - FLINK_OPTIONS} == known.keys()
        assert "--checkpointing_interval" in names


def test_settings_of_kafka_are_ours_and_secrets_are_files() -> None:
    named = {
        name: value
        for path in MANIFESTS
        for name, value in re.findall(r"^\s*(VQL_\w+): (.*)$", path.read_text(), re.MULTILINE)
    }
    kafka = {name.removeprefix("VQL_KAFKA_").lower() for name in named if name.startswith("VQL_KAFKA_")}

    assert kafka
    assert kafka <= KafkaSettings.model_fields.keys()
    assert [n for n in named if re.search("PASSWORD|SECRET|TOKEN|KEY", n) and not n.endswith("_FILE")] == []
    assert [value for value in named.values() if re.search(r"://[^/@\s]+@", value)] == []
    assert [d["kind"] for path in MANIFESTS for d in documents(path) if d.get("kind") == "Secret"] == []


def test_settings_of_redis_are_ours() -> None:
    text = "\n".join(path.read_text() for path in MANIFESTS)
    named = {name.lower() for name in re.findall(r"\bVQL_REDIS_(\w+):", text)}

    assert named
    assert named <= RedisSettings.model_fields.keys()
    users = set(re.findall(r"^user (vql-\w+)", (DEPLOY / "redis/users.acl").read_text(), re.MULTILINE))
    assert set(re.findall(r"VQL_REDIS_USERNAME: (\S+)", text)) == {"vql-reader", "vql-writer"} <= users


def test_our_containers_do_not_run_as_root() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1] == "10001:10001"
    for target in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[2:]:
        assert re.findall(r"^USER (.*)$", target, re.MULTILINE)[-1] == "10001:10001"


def test_the_workers_of_flink_find_what_the_job_names_under_the_same_paths() -> None:
    (workers,) = (each for each in our_containers() if each["name"] == "workers")
    (job,) = (each for each in our_containers() if "--" in command_line(each))

    assert workers["volumeMounts"] == job["volumeMounts"]
    assert (workers["envFrom"], workers["image"]) == (job["envFrom"], job["image"])
    assert "--environment_config=localhost:50000" in command_line(job)
    assert command_line(workers) == ["--service_port=50000"]


@pytest.mark.parametrize("service", ["stream", "ranker"])
def test_a_health_check_of_compose_passes_only_where_the_answer_is_200(service: str) -> None:
    check = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"][service]["healthcheck"]["test"]
    assert check[:2] == ["CMD", "python"]

    for status, wanted in ((200, 0), (503, 1)):
        with _answering(status) as port:
            code, changed = re.subn(r":\d+/healthz", f":{port}/healthz", check[3])
            assert changed == 1
            done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert done.returncode == wanted


@contextmanager
def _answering(status: int) -> Iterator[int]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status if self.path == "/healthz" else 404)
            self.end_headers()

        def log_message(self, format: str, *args: Any) -> None:
            """Not into the test's output."""

    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield server.server_port
        finally:
            server.shutdown()
            thread.join()


def _flink_images() -> list[str]:
    return [each["spec"]["image"] for each in all_documents() if each["kind"] == "FlinkDeployment"]


def _all_commands(commands: dict[str, Any]) -> Iterator[Any]:
    for each in commands.values():
        yield each
        yield from _all_commands(getattr(each, "commands", {}))


def _pod_labels(node: Any) -> Iterator[dict[str, str]]:
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}) and "labels" in node.get("metadata", {}):
            yield node["metadata"]["labels"]
        for below in node.values():
            yield from _pod_labels(below)
    elif isinstance(node, list):
        for below in node:
            yield from _pod_labels(below)
