"""The manifests by their schemas, and by what they promise: least rights, closed networks, names that fit.

Custom resources (SparkApplication, FlinkDeployment) have no schema in any package: only their parts are looked at.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from compose_spec import PyCompose

from tests.deployed import DEPLOY, KUBERNETES, all_documents, documents, spark_applications

# 1.28 has the label that a stream's pod knows its number by.
VERSIONS = ("1.28", "1.34")
CUSTOM = {"SparkApplication", "ScheduledSparkApplication", "FlinkDeployment", "Kustomization"}
KUSTOMIZATIONS = sorted(path.parent for path in KUBERNETES if path.name == "kustomization.yaml")
COMPOSE = (DEPLOY / "compose.yaml").read_text()
# Flink's image writes its own configuration.
WRITABLE_ROOT = {"flink-main-container"}


def compose_as_read(text: str) -> str:
    """With the variables that have to be set."""
    return re.sub(r"\$\{(\w+):\?[^}]*\}", r"/set/\1", text)


def faults_of_schema(document: dict[str, Any]) -> list[str]:
    faults = []
    for version in VERSIONS:
        try:
            kubernetes_validate.validate(document, version, strict=True)
        except kubernetes_validate.ValidationError as error:
            faults.append(f"{document['kind']} {'.'.join(map(str, error.path))}: {error.message}")
    return faults


def pods(node: Any) -> Iterator[tuple[dict[str, str], dict[str, Any]]]:
    """(labels, spec) of every pod template below."""
    if isinstance(node, dict):
        if "containers" in node.get("spec", {}):
            yield node.get("metadata", {}).get("labels", {}), node["spec"]
        for below in node.values():
            yield from pods(below)
    elif isinstance(node, list):
        for below in node:
            yield from pods(below)


def of_pod(spec: dict[str, Any]) -> list[dict[str, Any]]:
    return spec.get("initContainers", []) + spec["containers"]


def core() -> list[dict[str, Any]]:
    return [each for each in all_documents() if each["kind"] not in CUSTOM]


def faults_of_rights(pod: dict[str, Any], container: dict[str, Any]) -> list[str]:
    """What Pod Security's level "restricted" would refuse, and a root that can be written to."""
    own = container.get("securityContext", {})
    both = pod | own
    return [
        *(["may be root"] if both.get("runAsNonRoot") is not True or not both.get("runAsUser") else []),
        *(["seccomp"] if both.get("seccompProfile") != {"type": "RuntimeDefault"} else []),
        *(["may gain privileges"] if own.get("allowPrivilegeEscalation") is not False else []),
        *(["capabilities"] if own.get("capabilities") != {"drop": ["ALL"]} else []),
        *(["root can be written to"] if own.get("readOnlyRootFilesystem") is not True else []),
    ]


@pytest.mark.parametrize("path", KUBERNETES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_core_kinds_are_as_their_schemas_say(path: Path) -> None:
    assert [fault for each in documents(path) if each["kind"] not in CUSTOM for fault in faults_of_schema(each)] == []


def test_a_wrong_manifest_is_found() -> None:
    """The negative control of the test above."""
    (budget,) = (e for e in core() if e["kind"] == "PodDisruptionBudget" and e["metadata"]["name"] == "vql-serve")
    assert faults_of_schema(budget) == []
    assert len(faults_of_schema(budget | {"spec": {"maxUnavailable": [1]}})) == len(VERSIONS)
    assert len(faults_of_schema(budget | {"spec": budget["spec"] | {"maxAvailable": 1}})) == len(VERSIONS)


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="kubectl is not installed")
@pytest.mark.parametrize("folder", KUSTOMIZATIONS, ids=lambda folder: folder.name)
def test_a_kustomization_builds_what_its_schemas_allow(folder: Path) -> None:
    built = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    made = list(yaml.safe_load_all(built.stdout))
    assert {each["metadata"].get("namespace", "vql") for each in made} == {"vql"}
    assert [fault for each in made if each["kind"] not in CUSTOM for fault in faults_of_schema(each)] == []

    if folder.name == "gpu":
        (serve,) = (e for e in made if e["kind"] == "Deployment" and e["metadata"]["name"] == "vql-serve")
        (container,) = serve["spec"]["template"]["spec"]["containers"]
        assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
        assert "--device=cuda" in container["args"]
    if folder.name == "green":
        (green,) = (e for e in made if e["kind"] == "StatefulSet")
        (blue,) = (e for e in core() if e["kind"] == "StatefulSet")
        assert green["metadata"]["name"] == green["spec"]["serviceName"] == "vql-stream-green"
        assert green["spec"]["selector"] != blue["spec"]["selector"]
        checkpoints = [e["spec"]["template"]["spec"]["containers"][0]["env"][0] for e in (blue, green)]
        assert [each["name"] for each in checkpoints] == ["CHECKPOINT", "CHECKPOINT"]
        assert checkpoints[0]["value"] != checkpoints[1]["value"]


def test_kustomizations_name_files_that_are_there() -> None:
    named = [(folder / name).resolve() for folder in KUSTOMIZATIONS for name in _kustomization(folder)["resources"]]
    assert [path for path in named if not path.exists()] == []
    # Applied by hand, when they are wanted, or by the owners of other namespaces.
    alone = {DEPLOY / "kubernetes/spark/backfill.yaml", DEPLOY / "kubernetes/stores/network.yaml"}
    assert {path for path in KUBERNETES if path.name != "kustomization.yaml"} - alone == {
        p for p in named if p.is_file()
    }


def test_compose_is_as_its_specification_says() -> None:
    read = compose_as_read(COMPOSE)
    services = {"kafka", "topic", "redis", "stream", "ranker", "prometheus", "grafana"}
    assert set(PyCompose.from_yaml(read).service_names()) == services
    for wrong in (read.replace("read_only:", "readonly:"), read.replace("service_healthy", "healthy")):
        with pytest.raises(ValueError, match=r"readonly|healthy"):
            PyCompose.from_yaml(wrong)


def test_services_of_compose_have_few_rights_and_are_this_machines_alone() -> None:
    composed = yaml.safe_load(COMPOSE)
    for name, service in composed["services"].items():
        assert service["security_opt"] == ["no-new-privileges:true"], name
        assert service["cap_drop"] == ["ALL"], name
        if "kafka" not in service["image"]:
            assert service["read_only"] is True, name
            assert service["user"] not in ("0", "root", "0:0"), name
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", [])), name
        assert "healthcheck" in service or name == "topic", name
        assert set(service.get("secrets", [])) <= composed["secrets"].keys(), name
        mounted = {volume.split(":")[0] for volume in service.get("volumes", [])}
        assert {each for each in mounted if re.match(r"\w", each)} <= composed["volumes"].keys(), name
        assert all((DEPLOY / each).exists() for each in mounted if each.startswith("./")), name
        files = {value for key, value in service.get("environment", {}).items() if key.endswith("_FILE")}
        assert files <= {f"/run/secrets/{secret}" for secret in service.get("secrets", [])}, name


def test_prometheus_scrapes_the_ports_that_serve_metrics() -> None:
    scraped = yaml.safe_load((DEPLOY / "prometheus/prometheus.yml").read_text())["scrape_configs"]
    services = yaml.safe_load(COMPOSE)["services"]
    targets = {target for each in scraped for config in each["static_configs"] for target in config["targets"]}
    served = {f"{n}:{port[1]}" for n in ("stream", "ranker") if (port := _port(services[n]["command"]))}
    assert targets == served
    for labels, spec in pods(core()):
        if labels["app"] in ("vql-stream", "vql-serve"):
            (container,) = spec["containers"]
            assert int(_port(container["args"])[1]) == container["ports"][0]["containerPort"]


def test_pods_have_the_least_rights() -> None:
    found = list(pods(core()))
    assert len(found) == 8
    for labels, spec in found:
        assert spec["automountServiceAccountToken"] is False, labels
        for container in of_pod(spec):
            assert faults_of_rights(spec["securityContext"], container) == [], container["name"]
            assert container["resources"].keys() == {"requests", "limits"}, container["name"]


def test_what_an_operator_makes_has_the_least_rights_too() -> None:
    for spec in spark_applications():
        for role in (spec["driver"], spec["executor"]):
            assert faults_of_rights(role["podSecurityContext"], role) == []
    (flink,) = (each["spec"] for each in all_documents() if each["kind"] == "FlinkDeployment")
    common = flink["podTemplate"]["spec"]
    for container in common["containers"] + flink["taskManager"]["podTemplate"]["spec"]["containers"]:
        allowed = ["root can be written to"] if container["name"] in WRITABLE_ROOT else []
        assert faults_of_rights(common["securityContext"], container) == allowed, container["name"]


def test_each_right_that_is_missing_is_found() -> None:
    """The negative control of the tests above."""
    assert len(faults_of_rights({}, {})) == 5


def test_what_runs_for_long_has_probes_and_a_disruption_budget() -> None:
    budgets = [each["spec"]["selector"] for each in core() if each["kind"] == "PodDisruptionBudget"]
    for each in core():
        if each["kind"] in ("StatefulSet", "Deployment") and each["spec"]["replicas"] > 1:
            assert each["spec"]["selector"] in budgets
            (container,) = each["spec"]["template"]["spec"]["containers"]
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys()
    assert len(budgets) == 2


def test_mounts_have_volumes_and_these_what_they_name() -> None:
    maps = {each["metadata"]["name"]: each["data"] for each in core() if each["kind"] == "ConfigMap"}
    secrets = _secrets()
    for _, spec in pods(core()):
        volumes = {volume["name"]: volume for volume in spec["volumes"]}
        for container in of_pod(spec):
            mounts = {mount["mountPath"]: volumes[mount["name"]] for mount in container["volumeMounts"]}
            taken = [maps[each["configMapRef"]["name"]] for each in container.get("envFrom", [])]
            for name, path in ((n, p) for settings in taken for n, p in settings.items() if n.endswith("_FILE")):
                folder, _, file = path.rpartition("/")
                assert file in secrets[mounts[folder]["secret"]["secretName"]], name
        claims = [volume["persistentVolumeClaim"] for volume in volumes.values() if "persistentVolumeClaim" in volume]
        assert {claim["claimName"] for claim in claims} <= {"vql-checkpoint", "vql-log", "vql-work"}


def test_the_ranker_has_no_secret_but_the_readers() -> None:
    (serve,) = (spec for labels, spec in pods(core()) if labels["app"] == "vql-serve")
    assert [volume["secret"]["secretName"] for volume in serve["volumes"] if "secret" in volume] == ["vql-reader"]


def test_the_audit_has_no_secret_but_the_readers_and_is_not_repeated() -> None:
    (audit,) = (each["spec"] for each in core() if each["metadata"]["name"] == "vql-audit")
    ((_, pod),) = pods(audit)
    assert [volume["secret"]["secretName"] for volume in pod["volumes"] if "secret" in volume] == ["vql-reader"]
    assert (audit["jobTemplate"]["spec"]["backoffLimit"], pod["restartPolicy"]) == (0, "Never")
    # One audit at a time, and none that looks at a training as it is: its claims are read alone.
    assert audit["concurrencyPolicy"] == "Forbid"
    assert all(m["readOnly"] for m in pod["containers"][0]["volumeMounts"] if m["name"] in ("checkpoint", "log"))


def test_nobody_is_reached_who_is_not_named() -> None:
    policies = [each for each in core() if each["kind"] == "NetworkPolicy"]
    own = [each["spec"] for each in policies if "namespace" not in each["metadata"]]
    assert {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]} in own

    apps = {labels["app"] for labels, _ in pods(core())}
    apps |= {role["labels"]["app"] for spec in spark_applications() for role in (spec["driver"], spec["executor"])}
    # The operator gives its pods the deployment's name.
    apps |= {each["metadata"]["name"] for each in all_documents() if each["kind"] == "FlinkDeployment"}
    chosen = {each["podSelector"]["matchLabels"]["app"] for each in own if each["podSelector"]}
    assert chosen == apps
    # Apart from the shells' and jobs' way to the API server, every door has two ends that are named.
    opened = [rule for each in own for rule in each.get("ingress", [])]
    assert all(rule.get("from") and (rule.get("ports") or "vql-spark" in str(rule)) for rule in opened)


def test_the_stores_let_those_in_who_want_to_get_out() -> None:
    policies = [each for each in core() if each["kind"] == "NetworkPolicy"]
    for store in ("redis", "kafka"):
        (gate,) = (each for each in policies if each["metadata"].get("namespace") == store)
        let_in = {
            app
            for rule in gate["spec"]["ingress"]
            for peer in rule["from"]
            for chosen in peer["podSelector"].get("matchExpressions", [])
            for app in chosen["values"]
        }
        going = {
            each["spec"]["podSelector"]["matchLabels"]["app"]
            for each in policies
            for rule in each["spec"].get("egress", [])
            for peer in rule.get("to", [])
            if peer.get("namespaceSelector", {}).get("matchLabels") == {"kubernetes.io/metadata.name": store}
        }
        assert let_in == going


def _kustomization(folder: Path) -> dict[str, Any]:
    return yaml.safe_load((folder / "kustomization.yaml").read_text())


def _port(line: list[str]) -> re.Match[str] | None:
    return re.search(r"--(?:metrics-)?port=(\d+)", " ".join(line))


def _secrets() -> dict[str, list[str]]:
    """The secrets that config.yaml says are to be made, with their keys."""
    said = (DEPLOY / "kubernetes/base/config.yaml").read_text()
    found = re.findall(r"^#   ([\w-]+): +(.*?)(?: {2,}|$)", said, re.MULTILINE)
    return {name: keys.split(", ") for name, keys in found}
