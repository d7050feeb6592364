"""The image and the compose file: valid for the published schema, and made of what this repository has."""

import json
import re
import shlex
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from cluster_testing import CLUSTER, IN_IMAGE, PROJECT, ROOT, documents, values

FOLDER = CLUSTER / "docker"
DOCKERFILE = (FOLDER / "Dockerfile").read_text(encoding="utf-8")
(COMPOSE,) = documents(FOLDER / "compose.yaml")
SERVICES = COMPOSE["services"]
_VARIABLE = re.compile(r"\$\{(\w+)(?::([-?])([^}]*))?\}")


def instructions() -> list[tuple[str, str]]:
    """Instruction and arguments of each step of the Dockerfile."""
    lines = re.sub(r"^\s*#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ").splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def arguments(name: str) -> list[str]:
    return [rest for instruction, rest in instructions() if instruction == name]


def compose_schema() -> dict:
    path = files("check_jsonschema") / "builtin_schemas" / "vendor" / "compose-spec.json"
    return json.loads(path.read_text(encoding="utf-8"))


def mounts() -> list[tuple[str, str]]:
    """Source and target of every mount."""
    return [tuple(volume.split(":")[:2]) for service in SERVICES.values() for volume in service.get("volumes", [])]


def test_the_compose_file_is_valid():
    jsonschema.validate(COMPOSE, compose_schema())


@pytest.mark.parametrize("mistake", [{"volume": []}, {"shm_size": []}, {"depends_on": {"head": {"condition": "up"}}}])
def test_a_mistake_in_the_compose_file_is_found(mistake):
    tree = COMPOSE | {"services": SERVICES | {"worker": SERVICES["worker"] | mistake}}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, compose_schema())


def test_services_refer_to_what_is_there():
    for name, service in SERVICES.items():
        needed = service.get("depends_on", [])
        assert set(needed) <= set(SERVICES), name
        for other, how in needed.items() if isinstance(needed, dict) else []:
            assert how["condition"] != "service_healthy" or "healthcheck" in SERVICES[other], (name, other)
        if "build" in service:
            context = (FOLDER / service["build"]["context"]).resolve()
            assert context == ROOT
            assert (context / service["build"]["dockerfile"]).samefile(FOLDER / "Dockerfile")
            assert service["image"] == f"dllm-ray:{PROJECT['version']}-{service['build']['args']['KIND']}"
    named = {source for source, _ in mounts() if not source.startswith(".")}
    assert named == set(COMPOSE["volumes"])


@pytest.mark.parametrize("source", sorted({source for source, _ in mounts() if source.startswith(".")}))
def test_a_mounted_file_is_there(source):
    path = (FOLDER / source).resolve()
    assert path.is_relative_to(ROOT)
    if path.relative_to(ROOT).parts[0] == "dashboards" and not (ROOT / "dashboards").is_dir():
        pytest.skip("needs dashboards/, which is not there")
    assert path.exists()


def test_prometheus_reads_what_ray_lists():
    (of_head,) = [item for item in SERVICES["head"]["volumes"] if item.endswith(":/tmp/ray")]
    assert f"{of_head}:ro" in SERVICES["prometheus"]["volumes"], "at the same place: Ray leaves a symbolic link there"


def test_ports_are_open_to_this_machine_only():
    ports = [port for ports in values(COMPOSE, "ports") for port in ports]
    assert ports
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_every_variable_is_explained():
    text = (FOLDER / "compose.yaml").read_text(encoding="utf-8")
    told = re.findall(r"^#?(\w+)=", (FOLDER / ".env.example").read_text(encoding="utf-8"), re.MULTILINE)
    passed = {
        name for service in SERVICES.values() for name, value in service.get("environment", {}).items() if value is None
    }
    assert {name for name, *_ in _VARIABLE.findall(text)} | passed == set(told)


def test_ray_and_mlflow_take_their_options():
    from mlflow.cli import cli
    from ray.scripts.scripts import start

    for name in ("head", "worker", "worker-gpu"):
        program, command, *words = SERVICES[name]["command"]
        assert (program, command) == ("ray", "start")
        start.make_context("start", [_VARIABLE.sub(lambda found: found[3], word) for word in words])
    program, command, *words = SERVICES["mlflow"]["command"]
    assert program == "mlflow"
    context = cli.commands[command].make_context(command, words)
    assert context.params["port"] == 5000
    uri = SERVICES["head"]["environment"]["MLFLOW_TRACKING_URI"]
    assert uri.removeprefix("http://") in context.params["allowed_hosts"].split(",")


def test_base_images_are_pinned():
    stages = set()
    for line in arguments("FROM"):
        image, *name = line.split(" AS ")
        if not image.startswith("${"):
            assert re.fullmatch(r"[\w/.-]+:[\w.-]*\d[\w.-]*", image), image
        stages |= set(name)
    kinds = {service["build"]["args"]["KIND"] for service in SERVICES.values() if "build" in service}
    assert kinds == stages == {"cpu", "cuda"}


def test_what_is_copied_is_there_and_let_through():
    ignored = (FOLDER / "Dockerfile.dockerignore").read_text(encoding="utf-8").split("\n")
    copied = [word for line in arguments("COPY") for word in shlex.split(line)[:-1] if not word.startswith("--")]
    assert {"jobs", "configs", "dllm_ray", "pyproject.toml"} <= set(copied)
    for source in copied:
        assert (ROOT / source).exists(), source
        assert f"!{source}" in ignored
    assert [line[1:] for line in ignored if line.startswith("!")] == copied


def test_the_package_is_installed_within_its_bounds_and_run_by_a_user():
    assert not re.search(r"pip install[^&|]*\btorch\b", DOCKERFILE), "pyproject.toml says which torch"
    (extras,) = re.findall(r"pip install --no-cache-dir '\.\[([\w,]+)\]'", DOCKERFILE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]) - {"test", "dev"}
    assert arguments("USER")[-1] == "1000:1000"
    assert arguments("WORKDIR")[-1] == IN_IMAGE


def test_mounted_folders_belong_to_the_user():
    (made,) = [rest for rest in arguments("RUN") if "useradd" in rest]
    ours = {target for name in ("head", "worker", "mlflow") for target in targets(name)}
    assert ours == {"/shared", "/tmp/ray", "/mlflow"}
    for target in ours:
        assert re.search(rf"--owner ray[^&]* {target}\b", made), target


def targets(service: str) -> list[str]:
    return [volume.split(":")[1] for volume in SERVICES[service]["volumes"]]


def test_the_page_and_the_file_agree():
    page = Path(FOLDER / "README.md").read_text(encoding="utf-8")
    for ports in values(COMPOSE, "ports"):
        for port in ports:
            assert f"http://127.0.0.1:{port.split(':')[1]} " in page
