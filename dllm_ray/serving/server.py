"""Starting, updating and stopping a server on the connected Ray."""

import json
import logging
import re
import socket
import time
import urllib.error
import urllib.request
from contextlib import closing, suppress

import ray
from ray import serve
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from dllm_ray.config import section
from dllm_ray.errors import ConfigError, ModelError, ResourceError
from dllm_ray.models.load import check_path
from dllm_ray.serving.config import REGISTRY, ServeConfig
from dllm_ray.serving.deploy import INGRESS_CPUS, application

_ANSWER_S = 60.0  # within which the address answers when all replicas are up
_POLL_S = 0.2
_OWN_ERROR = re.compile(r"dllm_ray\.errors\.(\w+): (.+)")


def check(config: ServeConfig) -> None:
    """What can be known to be wrong before anything is started.

    Raises:
        ModelError: a model directory isn't one.
        ConfigError: sampler settings don't fit together.
    """
    for number, model in enumerate(config.served()):
        with section(f"models.{number}" if config.models else "model"):
            if model.path.startswith(REGISTRY):
                continue
            check_path(model.path)
            model.sampler_for(model.path)


def check_port(config: ServeConfig) -> None:
    """Tries the address.

    Raises:
        ConfigError: it can't be listened on.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    with closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((config.host, config.port))
        except (OSError, OverflowError) as error:
            raise ConfigError(f"can't listen on {config.host}:{config.port}: {error}", "port") from None


def start(config: ServeConfig, alone: bool = False) -> str:
    """Starts the server, or updates the one of the same name, and waits until it answers.

    Args:
        config: its settings.
        alone: on a Ray of our own, where nobody else needs Serve's proxies.

    Returns:
        Its address, e.g. http://127.0.0.1:8000.

    Raises:
        ResourceError: the cluster is too small, or the server doesn't come up.
        ModelError: a model can't be loaded.
        ConfigError: a setting doesn't fit its model.
    """
    logging.getLogger("ray.serve").setLevel(logging.WARNING)
    _check_resources(config)
    serve.start(
        proxy_location="Disabled" if alone else None,
        http_options={"host": config.host, "port": config.port, "keep_alive_timeout_s": 90},
        logging_config={"encoding": "JSON", "enable_access_log": False},
    )
    try:
        serve.run(application(config, listens=alone), name=config.name, route_prefix="/")
    except (RuntimeError, RayServeException) as error:
        raise _told(str(error)) from error
    address = _address(config)
    _wait(address)
    return address


def metrics() -> list[str]:
    """Where Prometheus finds the metrics of each node."""
    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics" for node in nodes]


def stop(config: ServeConfig) -> None:
    """Ends the server when what it has begun is finished, at most `drain_s` from now.

    Raises:
        ResourceError: its processes don't end.
    """
    until = time.monotonic() + 2 * config.drain_s + _ANSWER_S  # first the ingress, then the replicas
    ingress = serve.get_deployment_handle("ingress", config.name)
    with suppress(RayServeException, RayError, TimeoutError):  # it may be gone already
        ingress.broadcast("leave").results(timeout_s=config.drain_s + _ANSWER_S)
    serve.delete(config.name, _blocking=False)
    while config.name in serve.status().applications:
        if time.monotonic() > until:
            raise ResourceError(f"{config.name} has not ended within {config.drain_s:g} s")
        time.sleep(_POLL_S)


def _check_resources(config: ServeConfig) -> None:
    has = ray.cluster_resources()
    for kind, field, default in (("CPU", "cpus_per_replica", 1.0), ("GPU", "gpus_per_replica", float("GPU" in has))):
        needs = INGRESS_CPUS * config.ingress_replicas if kind == "CPU" else 0.0
        for model in config.served():
            each = getattr(model, field)
            needs += model.replicas * (default if each is None else each)
        if needs > has.get(kind, 0.0) + 1e-6:
            raise ResourceError(
                f"all replicas together need {needs:g} {kind}s, the cluster has {has.get(kind, 0.0):g}: lower replicas "
                f"or {field} of the models (fractions share one)"
            )


def _address(config: ServeConfig) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(config.host, config.host)
    return f"http://[{host}]:{config.port}" if ":" in host else f"http://{host}:{config.port}"


def _wait(address: str) -> None:
    until = time.monotonic() + _ANSWER_S
    while True:
        try:
            with urllib.request.urlopen(f"{address}/healthz", timeout=5) as response:
                json.load(response)
                return
        except (OSError, ValueError) as error:
            if time.monotonic() > until:
                raise ResourceError(
                    f"{address} doesn't answer ({error}): Ray Serve may run on this cluster already, and listen "
                    "elsewhere: "
                    "give its host and port"
                ) from None
        time.sleep(_POLL_S)


def _told(story: str) -> Exception:
    """An error of ours out of what Serve tells of a replica that didn't start."""
    found = _OWN_ERROR.findall(story)
    if found:
        kind, message = found[-1]
        return ConfigError(message) if kind == "ConfigError" else ModelError(message)
    lines = [line.strip() for line in story.splitlines() if line.strip()]
    return ResourceError(f"the server doesn't start: {lines[0] if lines else 'no reason given'} ... {lines[-1]}")
