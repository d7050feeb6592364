"""The Ray Serve application: an ingress that speaks HTTP, and a deployment of replicas for each model.

`build` is for `serve run dllm_ray.serving.deploy:build config=FILE.yaml` and `serve deploy`; jobs/serve.py calls
`application`. Serve's own queues stay empty, as what they refuse isn't answered in the API's words: replicas have
bounded queues, and what no replica can have room for is refused at the ingress.
"""

import hashlib
import json
import os
import re
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
from ray import serve

from dllm_ray.config import to_dict
from dllm_ray.serving.config import REGISTRY, ServeConfig, ServedModel, serve_config
from dllm_ray.serving.ingress import Ingress
from dllm_ray.serving.limits import Limits

INGRESS_CPUS = 0.1
"""What an ingress reserves."""

_ANY = 100_000  # calls that Serve lets pass to a process
_STARTS = 2  # attempts to start a replica, before the deployment counts as failed
_LOGGING = {"encoding": "JSON", "enable_access_log": False}


def build(arguments: dict[str, Any]) -> serve.Application:
    """The application that arguments describe; for the command lines of Ray Serve.

    Args:
        arguments: `config`, a settings file; any setting by its dotted name, e.g. `model.path`; and `revision`, which
            means nothing: Serve looks at the file again only when an argument has changed.

    Raises:
        ConfigError: a setting is wrong.
    """
    given = {name: value for name, value in arguments.items() if name != "revision"}
    return application(serve_config(given))


def application(config: ServeConfig, listens: bool = False) -> serve.Application:
    """The application that settings describe. Ray must be connected.

    Args:
        config: the settings.
        listens: the ingress listens itself, in place of Serve's proxies.

    Raises:
        ConfigError: a setting doesn't fit its model.
    """
    models = [_pinned(model, config.tracking_uri) for model in config.served()]
    processes = sum(model.replicas for model in models)
    handles, rooms = {}, {}
    for model in models:
        limits = model.limits_over(config.limits)
        handles[model.name] = _deployment(config, model, limits, processes)
        rooms[model.name] = (model.max_replicas or model.replicas) * (limits.max_rows + limits.max_queue)
    ingress = serve.deployment(
        Ingress,
        name="ingress",
        num_replicas=config.ingress_replicas,
        ray_actor_options={"num_cpus": INGRESS_CPUS},
        max_ongoing_requests=_ANY,
        max_queued_requests=-1,
        max_constructor_retry_count=_STARTS,
        logging_config=_LOGGING,
        **_leaving(config),
    )
    listen = (config.host, config.port) if listens else None
    ingress = _versioned(ingress, to_dict(config.settings()), rooms, config.insecure, listen)
    return ingress.bind(config.settings(), handles, rooms, config.insecure, listen, config.drain_s)


def _deployment(config: ServeConfig, model: ServedModel, limits: Limits, processes: int) -> serve.Application:
    """The replicas of one model."""
    from dllm_ray.serving.replica import ModelReplica

    gpus = model.gpus_per_replica
    if gpus is None:
        gpus = 1.0 if ray.is_initialized() and ray.cluster_resources().get("GPU") else 0.0
    scaling = {"num_replicas": model.replicas}
    if model.max_replicas is not None and model.max_replicas > model.replicas:
        scaling = {
            "autoscaling_config": {
                "min_replicas": model.replicas,
                "max_replicas": model.max_replicas,
                "target_ongoing_requests": model.target_calls or limits.max_rows,
                "metrics_interval_s": 0.5,
                "look_back_period_s": 2.0,
                "upscale_delay_s": 1.0,
                "downscale_delay_s": 60.0,
            }
        }
    # A change of what `reconfigure` takes, or of how many replicas there are, needs no new processes.
    settings = {"limits": to_dict(limits), "sampler": model.sampler}
    loaded = asdict(replace(model, sampler={}, limits={}, replicas=1, max_replicas=None, target_calls=None))
    threads = model.threads or max((os.cpu_count() or 1) // processes, 1)
    deployment = serve.deployment(
        ModelReplica,
        name=f"model-{re.sub(r'[^A-Za-z0-9_.-]', '-', model.name)}-{_digest(model.name)[:6]}",
        user_config=settings,
        ray_actor_options={"num_cpus": model.cpus_per_replica or 1.0, "num_gpus": gpus},
        max_ongoing_requests=_ANY,
        max_queued_requests=-1,
        max_constructor_retry_count=_STARTS,
        logging_config=_LOGGING,
        **scaling,
        **_leaving(config),
    )
    deployment = _versioned(deployment, loaded, [_contents(path) for path in (model.path, model.adapter)])
    return deployment.bind(loaded, threads, config.drain_s, config.tracking_uri)


def _leaving(config: ServeConfig) -> dict[str, Any]:
    """How replicas leave and are replaced."""
    return {
        "graceful_shutdown_timeout_s": config.drain_s,
        "graceful_shutdown_wait_loop_s": 0.2,
        "max_surge_percent": 100 if config.update == "start_first" else 0,
    }


def _pinned(model: ServedModel, tracking_uri: str | None) -> ServedModel:
    """The model with versions in place of MLflow's aliases, so that all its replicas hold the same, and a moved alias
    is a change."""
    if not any(path and path.startswith(REGISTRY) for path in (model.path, model.adapter)):
        return model
    from dllm_ray.tracking import registered_version

    path, adapter = (
        registered_version(path, tracking_uri) if path and path.startswith(REGISTRY) else path
        for path in (model.path, model.adapter)
    )
    return replace(model, path=path, adapter=adapter)


def _contents(path: str | None) -> list[tuple[str, int, int]]:
    """Names, sizes and times of the files of a model directory: a model that was trained again is another one."""
    folder = Path(path or "")
    if path is None or not folder.is_dir():
        return []
    files = (file for file in sorted(folder.iterdir()) if file.is_file())
    return [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _versioned(deployment: serve.Deployment, *values: Any) -> serve.Deployment:
    """The deployment with a version by what it is made of. Left to itself Serve replaces the replicas of all models
    when one is changed; large ones might not even fit beside each other."""
    return deployment.options(version=_digest(*values), _internal=True)


def _digest(*values: Any) -> str:
    return hashlib.sha256(json.dumps([version("dllm-ray"), *values], sort_keys=True).encode()).hexdigest()
