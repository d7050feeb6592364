"""All checks, one after the other."""

import os
import socket
import tomllib
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from importlib.metadata import PackageNotFoundError, metadata, requires
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from packaging.requirements import Requirement

from dllm_ray import cluster, tracking
from dllm_ray.doctor import judge, network, nodes, storage
from dllm_ray.doctor.config import DoctorConfig
from dllm_ray.doctor.findings import Finding
from dllm_ray.doctor.judge import DRIVER, Answer
from dllm_ray.doctor.probe import Probe
from dllm_ray.errors import ResourceError, first_line

_CONNECT_S = 5.0
_GB = 1e9
_START = "is the node overloaded? Ray's logs on it, raylet.out and the newest worker's, say more"


def examine(job: DoctorConfig, tell: Callable[[Finding], None]) -> dict[str, Any]:
    """Makes all checks. None waits longer than the settings say.

    Args:
        job: settings.
        tell: called with each finding as soon as there is one.

    Returns:
        The facts: `nodes`, `pairs`, `clocks`.
    """

    def report(findings: Iterable[Finding]) -> None:
        for finding in findings:
            tell(finding)

    store = nodes.later(tracking.probe, job.tracking) if job.tracking.uri is not None else None
    facts: dict[str, Any] = {}
    with ExitStack() as stack:
        joined = _join(stack, job)
        report(joined)
        if not joined:
            facts = _look_around(job, report)
    answer = store(job.timeout_s) if store is not None else Answer()
    report(judge.mlflow(answer, job.tracking.uri))
    return facts


def _join(stack: ExitStack, job: DoctorConfig) -> list[Finding]:
    """Connects to Ray; what stands in the way."""
    address = os.environ.get("RAY_ADDRESS", "")
    advice = "start the head (`ray start --head`), and mend RAY_ADDRESS or the firewall"
    problem = _nobody_there(address)
    if problem is None:
        advice = "RAY_AUTH_MODE (token or disabled) and the token must be the head's, and Ray's version the same"
        try:
            stack.enter_context(cluster.connect())
        except ResourceError as error:
            problem = first_line(error)
        except Exception as error:  # Ray's own, of which there are many
            problem = f"{type(error).__name__}: {first_line(error)}"
    return [] if problem is None else [Finding("ray", "fault", DRIVER, problem, advice)]


def _nobody_there(address: str) -> str | None:
    """Why no connection is made to an address like 10.0.0.1:6379; None: one is, or the address is of another form."""
    host, _, port = (urlsplit(address).netloc if "://" in address else address).rpartition(":")
    if not (host and port.isdecimal()):
        return None
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except OSError as error:
        return f"nothing answers at RAY_ADDRESS={address}: {error.strerror or error}"
    return None


def _look_around(job: DoctorConfig, report: Callable[[Iterable[Finding]], None]) -> dict[str, Any]:
    there = nodes.alive()
    needs, python = requirements()
    packages = [Requirement(text).name for text in needs] + ["dllm-ray"]
    counted = {node.name: node.resources for node in there}
    with network.Peers(there) as peers, nodes.actors(Probe, there) as probes:
        asked = {node.name: probes[node.name].facts.remote(packages, node.temporary) for node in there}
        answers = nodes.answers(asked, job.timeout_s)
        report(judge.unanswered("ray", answers, _START))
        facts = {name: answer.value for name, answer in answers.items() if answer.problem is None}
        probes = {name: probe for name, probe in probes.items() if name in facts}
        here = Probe().facts(packages)
        report(judge.versions({DRIVER: here, **facts}, needs, python))
        report(judge.nodes(facts, counted, nodes.dead(), job.nodes))
        offsets = _clocks(probes, job, report)
        least = job.min_free_gb * _GB
        for place in storage.places(job):
            report(storage.visit(place, probes, job.timeout_s, least))
        found = nodes.answers(
            {name: probe.hub.remote(job.timeout_s / 2) for name, probe in probes.items()}, job.timeout_s
        )
        report(judge.unanswered("hub", found, "look whether HF_ENDPOINT and the cache folder (HF_HOME) hang there"))
        report(judge.hub({name: answer.value for name, answer in found.items() if answer.problem is None}, least))
        found = {name: answer for name, answer in peers.devices(job.timeout_s).items() if name in facts}
        report(judge.unanswered("gpu", found, "`nvidia-smi` and `python -c 'import torch'` there say more"))
        devices = {name: answer.value for name, answer in found.items() if answer.problem is None}
        report(judge.gpus(devices, facts, counted))
        between = network.backends(devices, {name: fact["boot"] for name, fact in facts.items()})
        skipped = [node.name for node in there if node.name not in devices]
        pairs = peers.reach(between, job.pair_timeout_s, skipped)
        report(judge.network(pairs, facts, {node.name: node.address for node in there}))
    return {
        "nodes": {name: {**fact, "devices": devices.get(name)} for name, fact in facts.items()},
        "driver": here,
        "clocks": {name: {"ahead_s": ahead, "known_to_s": error} for name, (ahead, error) in offsets.items()},
        "pairs": [vars(pair) for pair in pairs],
    }


def _clocks(
    probes: Mapping[str, Any], job: DoctorConfig, report: Callable[[Iterable[Finding]], None]
) -> dict[str, tuple[float, float]]:
    offsets = {DRIVER: (0.0, 0.0)}
    for name, probe in probes.items():
        try:
            offsets[name] = nodes.offset(probe, job.timeout_s)
        except Exception as error:  # Ray has many for a node that is gone
            report([Finding("clock", "fault", name, first_line(error), _START)])
    report(judge.clocks(offsets, job.max_clock_skew_s))
    return offsets


def requirements() -> tuple[list[str], str]:
    """What this package needs, and on which versions of Python: of the checkout that it is, or as it was installed."""
    try:
        project = tomllib.loads((Path(__file__).resolve().parents[2] / "pyproject.toml").read_text())["project"]
        return project["dependencies"], project["requires-python"]
    except (OSError, KeyError):
        pass
    try:
        needs = [text for text in requires("dllm-ray") or [] if "extra ==" not in text]
        return needs, metadata("dllm-ray")["Requires-Python"]
    except PackageNotFoundError:
        return [], ">=3.11"
