"""The manifests for Kubernetes: valid for KubeRay's and Kubernetes' schemas, and true about this repository."""

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from cluster_testing import CLUSTER, IN_IMAGE, PROJECT, ROOT, after_submission, check_job, documents, values
from packaging.requirements import Requirement
from ray.serve import Application
from ray.serve.schema import ServeDeploySchema

from dllm_ray.errors import ConfigError

FOLDER = CLUSTER / "kuberay"
PATCH = FOLDER / "redis.yaml"
MANIFESTS = sorted(path for path in FOLDER.rglob("*.yaml") if path != PATCH)
JOBS = sorted((FOLDER / "jobs").glob("*.yaml"))
OF_KUBERAY = {"RayCluster": "rayclusters", "RayJob": "rayjobs", "RayService": "rayservices"}
KUBERNETES = "1.34"
NOT_SUBMITTED = {"chat", "serve", "benchmark"}
"""Jobs that speak with a person, that are a RayService here, and that measure one machine."""

WITHOUT_SCHEMA = {"podmonitor"}
"""Of the Prometheus operator, whose schemas no package has."""


def of_kind(*kinds: str) -> list[Path]:
    return [path for path in MANIFESTS if documents(path)[0]["kind"] in kinds]


@cache
def validator_of(folder: Path, kind: str) -> jsonschema.Draft202012Validator:
    """The schema of a kind's version v1. As an API server that is asked to be strict, it refuses unknown fields."""
    text = (folder / "kuberay" / f"ray.io_{OF_KUBERAY[kind]}.yaml").read_text(encoding="utf-8")
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = [one for one in definition["spec"]["versions"] if one["name"] == "v1"]
    return jsonschema.Draft202012Validator(strict(version["schema"]["openAPIV3Schema"]))


def strict(schema: Any) -> Any:
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    schema = {key: strict(value) for key, value in schema.items()}
    open_ended = schema.get("additionalProperties") or schema.get("x-kubernetes-preserve-unknown-fields")
    if isinstance(schema.get("properties"), dict) and "type" in schema and not open_ended:
        schema["additionalProperties"] = False
    return schema


def check(document: dict[str, Any], facts: Path) -> None:
    """Validates one object, as far as schemas go."""
    kind = document["kind"]
    if kind not in OF_KUBERAY:
        kubernetes_validate.validate(document, KUBERNETES, strict=True)
        return
    assert document["apiVersion"] == "ray.io/v1"
    validator_of(facts, kind).validate(document)
    for template in values(document, "template"):
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata", {}), "spec": template["spec"]}
        kubernetes_validate.validate(pod, KUBERNETES, strict=True)
    metadata = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": document["metadata"]}
    kubernetes_validate.validate(metadata, KUBERNETES, strict=True)


def refused_by_the_operator(document: dict[str, Any]) -> list[str]:
    """What KubeRay's operator refuses beyond its schemas."""
    found, spec, name = [], document["spec"], document["metadata"]["name"]
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,45}[a-z0-9])?", name):
        found.append(f"name {name}")
    if document["kind"] == "RayJob":
        if ("clusterSelector" in spec) == ("rayClusterSpec" in spec):
            found.append("a RayJob names a cluster, or describes one")
        if "clusterSelector" in spec and spec.keys() & {"backoffLimit", "shutdownAfterJobFinishes", "suspend"}:
            found.append("a cluster that is there already is neither ended nor replaced")
        if spec.get("ttlSecondsAfterFinished") and not spec.get("shutdownAfterJobFinishes"):
            found.append("ttlSecondsAfterFinished without shutdownAfterJobFinishes")
    for cluster in clusters(document):
        groups = cluster["workerGroupSpecs"]
        found += [f"replicas of {group['groupName']}" for group in groups if not is_in_order(group)]
        if list(values(cluster, "restartPolicy")) and cluster["autoscalerOptions"]["version"] == "v2":
            found.append("restartPolicy with autoscaler v2")
        if cluster["authOptions"]["mode"] == "token" and not cluster.get("rayVersion"):
            found.append("tokens without a rayVersion")
    return found


def is_in_order(group: dict[str, Any]) -> bool:
    return 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def clusters(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The descriptions of a Ray cluster in a manifest."""
    spec = document.get("spec", {})
    described = {"RayCluster": spec, "RayJob": spec.get("rayClusterSpec"), "RayService": spec.get("rayClusterConfig")}
    found = described.get(document["kind"])
    return [found] if found else []


def pods() -> list[tuple[Path, dict[str, Any]]]:
    found = [
        (path, template["spec"])
        for path in MANIFESTS
        for document in documents(path)
        for cluster in clusters(document)
        for template in values(cluster, "template")
    ]
    assert len(found) == 9, "a head and two groups in each of three manifests"
    return found


@pytest.mark.parametrize(
    "path", [path for path in MANIFESTS if path.stem not in WITHOUT_SCHEMA], ids=lambda path: path.stem
)
def test_a_manifest_is_valid(path, facts):
    for document in documents(path):
        check(document, facts)
        if document["kind"] in OF_KUBERAY:
            assert refused_by_the_operator(document) == []


def test_the_server_is_valid_with_redis_too(facts):
    (server,), (patch,) = documents(FOLDER / "rayservice.yaml"), documents(PATCH)
    assert patch["spec"]["rayClusterConfig"].keys() == {"gcsFaultToleranceOptions"}
    assert not list(values(server, "gcsFaultToleranceOptions")), "only where a Redis is named"
    server["spec"]["rayClusterConfig"] |= patch["spec"]["rayClusterConfig"]
    check(server, facts)


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("raycluster", ["spec", "workerGroupSpecs", 1, "maxReplica"], 3),
        ("raycluster", ["spec", "workerGroupSpecs", 1, "maxReplicas"], "8"),
        ("raycluster", ["spec", "authOptions", "mode"], "password"),
        ("raycluster", ["spec", "headGroupSpec", "template", "spec", "containers", 0, "volumeMount"], []),
        ("raycluster", ["metadata", "label"], {}),
        ("rayservice", ["spec", "upgradeStrategy", "kind"], "NewCluster"),
        ("jobs/sft", ["spec", "entryPoint"], "python"),
        ("storage", ["spec", "accessMode"], ["ReadWriteMany"]),
        ("settings", ["data", "NUMBER"], 3),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_mistake_in_a_manifest_is_found(file, path, value, facts):
    (document,) = documents(FOLDER / f"{file}.yaml")
    place = document
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises((jsonschema.ValidationError, kubernetes_validate.ValidationError)):
        check(document, facts)


def test_each_job_that_can_be_submitted_has_a_manifest():
    names = {path.stem for path in (ROOT / "jobs").glob("*.py")}
    assert {path.stem for path in JOBS} == names - NOT_SUBMITTED


@pytest.mark.parametrize("path", of_kind("RayJob"), ids=lambda path: path.stem)
def test_an_entrypoint_is_a_job_and_options_that_it_takes(path):
    (document,) = documents(path)
    name = check_job(after_submission(document["spec"]["entrypoint"]))
    if path in JOBS:
        assert name == path.stem == document["metadata"]["name"]
        (standing,) = documents(FOLDER / "raycluster.yaml")
        assert document["spec"]["clusterSelector"] == {"ray.io/cluster": standing["metadata"]["name"]}


def test_an_option_that_a_job_does_not_take_is_found():
    (document,) = documents(FOLDER / "jobs" / "sft.yaml")
    with pytest.raises(AssertionError, match=r"did you mean train\.workers"):
        check_job(after_submission(document["spec"]["entrypoint"].replace("train.workers", "train.worker")))


def test_what_is_served_is_an_application_and_settings_that_it_takes(monkeypatch):
    monkeypatch.setattr("dllm_ray.serving.deploy._contents", lambda path: [])  # no model is at hand
    (document,) = documents(FOLDER / "rayservice.yaml")
    config = ServeDeploySchema.model_validate(yaml.safe_load(document["spec"]["serveConfigV2"]))
    (application,) = config.applications
    module, name = application.import_path.split(":")
    build = getattr(__import__(module, fromlist=[name]), name)
    arguments = application.args | {"config": application.args["config"].replace(IN_IMAGE, str(ROOT))}
    assert isinstance(build(arguments), Application)
    assert document["spec"]["rayClusterDeletionDelaySeconds"] > application.args["drain_s"]
    (gpu,) = [
        group for group in document["spec"]["rayClusterConfig"]["workerGroupSpecs"] if group["groupName"] == "gpu"
    ]
    assert gpu["maxReplicas"] >= application.args["model.max_replicas"], "a GPU for each replica"
    with pytest.raises(ConfigError, match=r"model\.max_replica"):
        build(arguments | {"model.max_replica": 2})


def test_pods_differ_in_what_they_offer_alone():
    for name in ("image", "envFrom", "volumeMounts", "volumes", "securityContext"):
        found = {json.dumps(value, sort_keys=True) for _, pod in pods() for value in values(pod, name)}
        assert len(found) == (2 if name == "securityContext" else 1), (name, found)  # of the pod, of its container


def test_pods_run_this_version_as_nobody_special():
    (ray,) = [Requirement(line) for line in PROJECT["dependencies"] if line.startswith("ray[")]
    for path in of_kind("RayCluster", "RayJob", "RayService"):
        for cluster in clusters(documents(path)[0]):
            assert ray.specifier.contains(cluster["rayVersion"])
    for _, pod in pods():
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert [item["image"] for item in pod["containers"]] == [f"dllm-ray:{PROJECT['version']}-cuda"]


def test_names_that_manifests_refer_to_are_there():
    named = {(item["kind"], item["metadata"]["name"]) for path in MANIFESTS for item in documents(path)}
    mentioned = set()
    for _, pod in pods():
        mentioned |= {("ConfigMap", item["name"]) for item in values(pod, "configMapRef")}
        mentioned |= {("PersistentVolumeClaim", item["claimName"]) for item in values(pod, "persistentVolumeClaim")}
        secrets = {item["name"] for item in values(pod, "secretRef")}
        assert secrets == {"dllm-ray-secrets"}
    assert mentioned <= named
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert "secret generic dllm-ray-secrets --from-env-file" in page
    (reference,) = values(documents(PATCH), "secretKeyRef")
    assert reference["name"] == "dllm-ray-secrets"
    assert f"#{reference['key']}=" in (FOLDER / "secrets.env.example").read_text(encoding="utf-8")


def test_prometheus_finds_ports_that_pods_have():
    (monitor,) = documents(FOLDER / "podmonitor.yaml")
    asked = {item["port"] for item in monitor["spec"]["podMetricsEndpoints"]}
    offered = {port["name"] for _, pod in pods() for ports in values(pod, "ports") for port in ports}
    assert asked <= offered
    assert all("metrics" in {port["name"] for ports in values(pod, "ports") for port in ports} for _, pod in pods())
