"""What can be checked of deploy/ without a container or a cluster: that it is well formed, and names what there is."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml
from apache_beam.options.pipeline_options import PipelineOptions

from jobs.cli import app
from jobs.jars import KAFKA_VERSION
from pipelines.kafka_settings import KafkaSettings

ROOT = Path(__file__).parents[1]
DEPLOY = ROOT / "deploy"
MANIFESTS = sorted(DEPLOY.rglob("*.yaml"))
DOCKERFILE = (DEPLOY / "Dockerfile").read_text()
OURS = ("vql-stream", "vql-trainer")
# Beam's job server for Flink tells the client of this one when it is asked; without it, it cannot be looked up.
FLINK_OPTIONS = {"--checkpointing_interval"}
# On their way into `vql stream`.
# A pod template that only adds to the operator's own container has no image.
WITHOUT_IMAGE = {"flink-main-container"}


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(path.read_text()))


def containers(node: Any) -> Iterator[dict[str, Any]]:
    """Everything in the tree that runs an image: containers of pods, services of compose."""
    if isinstance(node, dict):
        for name, each in node.get("services", {}).items():
            yield {"name": name} | each
        for each in node.get("containers", []):
            yield each
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


def streams() -> list[list[str]]:
    return [command_line(found) for found in our_containers() if command_line(found)[0] == "stream"]


def servers() -> list[list[str]]:
    return [command_line(found) for found in our_containers() if command_line(found)[0] == "serve"]


def faults_of_vql(line: list[str]) -> list[str]:
    """What `vql` would not know of a command line, and what it would miss."""
    command = typer.main.get_command(app).commands.get(line[0])
    if command is None:
        return [line[0]]
    known = {option: each for each in command.params for option in each.opts}
    own = line[1 : line.index("--")] if "--" in line else line[1:]
    given = {argument.partition("=")[0] for argument in own}
    needed = {each.opts[-1] for each in command.params if each.required}
    return sorted(given - known.keys()) + sorted(needed - given)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_is_yaml_and_says_that_it_was_not_tested(path: Path) -> None:
    assert path.read_text().startswith("# Not tested:")
    assert all(isinstance(document, dict) and document for document in documents(path))
    for document in documents(path) if path.parent.name == "kubernetes" else []:
        assert {"apiVersion", "kind"} <= document.keys()


def test_the_readme_names_every_file_and_says_that_none_was_tested() -> None:
    readme = (DEPLOY / "README.md").read_text()
    files = {path.relative_to(DEPLOY).as_posix() for path in DEPLOY.rglob("*") if path.is_file()} - {"README.md"}

    assert "**Not tested.**" in readme
    assert [name for name in files if f"`{name}`" not in readme] == []


def test_images_have_a_version() -> None:
    images = [found["image"] for found in all_containers() if found["name"] not in WITHOUT_IMAGE]
    images += [spec for document in documents(DEPLOY / "kubernetes/flink.yaml") for spec in _flink_image(document)]
    images += [name for name in re.findall(r"^FROM (\S+)", DOCKERFILE, re.MULTILINE) if name != "stream"]

    assert len(images) > 8
    assert [image for image in images if not re.search(r":[\w.-]*\d[\w.-]*$", image)] == []


def test_versions_are_those_of_the_project() -> None:
    beam, ours = importlib.metadata.version("apache-beam"), importlib.metadata.version("vql-cache")
    images = {found["image"] for found in all_containers() if "image" in found}
    (flink,) = (spec for document in documents(DEPLOY / "kubernetes/flink.yaml") for spec in _flink_image(document))
    minor = re.search(r"flink:(\d+\.\d+)", flink)[1]
    uv = re.search(r"^UV := (\S+)", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]

    assert f"apache/beam_flink{minor}_job_server:{beam}" in images
    assert f"apache/kafka:{KAFKA_VERSION}" in images
    assert f"vql-stream:{ours}" in images
    assert f"uv=={uv}" in DOCKERFILE


def test_the_streams_and_servers_use_options_that_there_are() -> None:
    faults = [fault for line in streams() + servers() for fault in faults_of_vql(line)]
    assert (len(streams()), len(servers())) == (3, 1)
    assert faults == []


def test_an_option_that_there_is_not_is_found() -> None:
    """The negative control of the test above."""
    whole = ["stream", "--checkpoint=c", "--log=l", "--state=s"]

    assert faults_of_vql(whole) == []
    assert faults_of_vql([*whole[:-1], "--colour=red"]) == ["--colour", "--state"]
    assert faults_of_vql(["flow"]) == ["flow"]


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
    settings = pytest.importorskip("feature_repo.redis_settings", reason="Redis' settings are not there yet")
    text = "\n".join(path.read_text() for path in MANIFESTS)
    named = {name.lower() for name in re.findall(r"\bVQL_REDIS_(\w+):", text)}

    assert named
    assert named <= settings.RedisSettings.model_fields.keys()


def test_our_containers_do_not_run_as_root() -> None:
    assert re.findall(r"^USER (.*)$", DOCKERFILE, re.MULTILINE)[-1] == "10001:10001"
    for target in re.split(r"^FROM ", DOCKERFILE, flags=re.MULTILINE)[2:]:
        assert re.findall(r"^USER (.*)$", target, re.MULTILINE)[-1] == "10001:10001"
    found = [each for each in our_containers() if "securityContext" in each]
    assert len(found) == 4
    assert all(each["securityContext"]["allowPrivilegeEscalation"] is False for each in found)


def test_the_workers_of_flink_find_what_the_job_names_under_the_same_paths() -> None:
    (workers,) = (each for each in our_containers() if each["name"] == "workers")
    (job,) = (each for each in our_containers() if "--" in command_line(each))

    assert workers["volumeMounts"] == job["volumeMounts"]
    assert (workers["envFrom"], workers["image"]) == (job["envFrom"], job["image"])
    assert "--environment_config=localhost:50000" in command_line(job)
    assert command_line(workers) == ["--service_port=50000"]


def _flink_image(document: dict[str, Any]) -> list[str]:
    return [document["spec"]["image"]] if document["kind"] == "FlinkDeployment" else []
