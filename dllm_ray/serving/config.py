"""Settings of a server: which models, how many replicas of each and with what, and who may ask. Plain data, no Ray."""

import hashlib
import ipaddress
import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from dllm_ray.config import flatten, parse, read, section
from dllm_ray.errors import ConfigError
from dllm_ray.models.config import ModelConfig, place
from dllm_ray.models.defaults import edits, sampler_settings
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.serving.limits import Limits
from dllm_ray.serving.settings import AppSettings

KEYS = "DLLM_RAY_API_KEYS"
"""Environment variable with API keys as they are, separated by commas or white space."""
REGISTRY = "models:/"
"""How the name of a model in MLflow's registry begins."""
_UNTELLING = ("final", "merged", "checkpoint", "model")  # last parts of paths that don't tell models apart
_NAME = re.compile(r"[\w.@:/+-]{1,200}", re.ASCII)


@dataclass
class ServedModel:
    """A model, and what its replicas are."""

    name: str | None = None
    """What clients call it; null: the hub id, or the last part of the path that tells something, and the adapter's."""
    path: str | None = None
    """A Hugging Face or adapter directory, a hub id, or a model of MLflow's registry: `models:/name/3`,
    `models:/name@alias`, an alias being looked up when the server is started or updated."""
    adapter: str | None = None
    """A PEFT adapter to put on top; a directory, or a model of MLflow's registry."""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    """Type the weights are held in; `auto` keeps the checkpoint's."""
    quantization: Literal["4bit", "8bit"] | None = None
    """Load the linear layers through bitsandbytes in 4-bit NF4 or in 8 bits."""
    device_map: str | None = None
    """Spread the layers over a replica's devices: `auto`, `balanced` or `sequential`; null: all on its own device."""
    compile: Literal["default", "reduce-overhead"] | None = None
    """Compile the model's forward with `torch.compile`; null: as it is."""
    sampler: dict[str, Any] = field(default_factory=dict)
    """Changes to the model's own sampler settings, e.g. `{steps: 64}`. Calls may change them further."""
    limits: dict[str, Any] = field(default_factory=dict)
    """Changes to the server's limits for this model, e.g. `{max_rows: 8}`."""
    replicas: int = 1
    """Processes that hold the model; the fewest, where `max_replicas` is set."""
    max_replicas: int | None = None
    """Most replicas; their number then follows the calls under way. null: as many as `replicas`."""
    target_calls: float | None = None
    """Calls under way at a replica that the number of replicas aims at; null: as many as it denoises together
    (`limits.max_rows`)."""
    cpus_per_replica: float | None = None
    """CPUs each replica reserves; null: 1."""
    gpus_per_replica: float | None = None
    """GPUs each replica reserves; fractions share a GPU; null: 1 where the cluster has any."""
    threads: int | None = None
    """Torch threads in each replica on a CPU; null: the machine's cores divided by all replicas."""

    def __post_init__(self):
        self.path, self.adapter = (path and place(path) for path in (self.path, self.adapter))
        if self.path is None:
            return  # `ServeConfig.served` asks for it
        if self.name is None:
            self.name = _name_for(self.path, self.adapter)
        if not _NAME.fullmatch(self.name):
            raise ConfigError(
                f"expected letters, digits and . _ - + @ : / (at most 200), got {self.name!r}: set a name", "name"
            )
        for name in ("replicas", "max_replicas", "threads"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ConfigError(f"must be at least replicas ({self.replicas}), got {self.max_replicas}", "max_replicas")
        if self.target_calls is not None and not self.target_calls > 0:
            raise ConfigError(f"must be above 0, got {self.target_calls}", "target_calls")
        if self.cpus_per_replica is not None and not self.cpus_per_replica > 0:
            raise ConfigError(f"must be above 0, got {self.cpus_per_replica}", "cpus_per_replica")
        if self.gpus_per_replica is not None and self.gpus_per_replica < 0:
            raise ConfigError(f"must not be negative, got {self.gpus_per_replica}", "gpus_per_replica")

    def loaded(self, path: str, adapter: str | None) -> ModelConfig:
        """What a replica loads.

        Args:
            path: where the model lies on its machine.
            adapter: where the adapter lies.
        """
        names = ("dtype", "quantization", "device_map", "compile")
        return ModelConfig(path=path, adapter=adapter, **{name: getattr(self, name) for name in names})

    def sampler_for(self, path: str) -> SamplerConfig:
        """The model's own sampler settings with the changes of this server.

        Raises:
            ConfigError: a change can't be.
        """
        with section("sampler"):
            config = read(SamplerConfig, sampler_settings(path) | self.sampler, "sampler")
            if not edits(path):  # which has no blocks
                config.blocks()
        return config

    def limits_over(self, base: Limits) -> Limits:
        """The server's limits with this model's changes.

        Raises:
            ConfigError: a change can't be.
        """
        known = {item.name for item in fields(Limits)}
        if not self.limits.keys() <= known:
            (name, *_) = sorted(self.limits.keys() - known)
            raise ConfigError(f"unknown limit {name!r}; expected one of {', '.join(sorted(known))}", "limits")
        with section("limits"):
            return replace(base, **self.limits)


@dataclass
class ServeConfig:
    """Settings of jobs/serve.py."""

    name: str = "dllm_ray"
    """Of the Ray Serve application: starting the same one again on a cluster updates it."""
    host: str = "127.0.0.1"
    """Address to listen on: 0.0.0.0 for every network, which needs API keys. Where Ray Serve runs already it listens
    as it was told."""
    port: int = 8000
    """Port to listen on."""
    insecure: bool = False
    """Answer other machines without API keys, too."""
    detach: bool = False
    """On a cluster that was joined: leave the server running and return, in place of stopping it at Ctrl-C."""
    model: ServedModel = field(default_factory=ServedModel)
    """The model; or list several in `models`."""
    models: list[ServedModel] = field(default_factory=list)
    """The models, called by their names."""
    limits: Limits = field(default_factory=Limits)
    """What calls may ask of each replica, and how many wait."""
    app: AppSettings = field(default_factory=AppSettings)
    """Of the HTTP side. Keys in the environment variable DLLM_RAY_API_KEYS count as well as `app.api_keys`."""
    ingress_replicas: int = 1
    """Processes that speak HTTP with clients."""
    update: Literal["start_first", "stop_first"] = "start_first"
    """How replicas are replaced when a running server is updated: the new ones begin before the old ones leave, which
    needs room for both, or one by one where there is none."""
    drain_s: float = 120.0
    """Seconds that a replica which is to leave may take to finish what it has begun."""
    tracking_uri: str | None = None
    """MLflow server or database of the models named `models:/...`; null: as MLFLOW_TRACKING_URI says."""

    def __post_init__(self):
        if not 1 <= self.port < 2**16:
            raise ConfigError(f"must lie between 1 and 65535, got {self.port}", "port")
        if self.ingress_replicas < 1:
            raise ConfigError(f"must be at least 1, got {self.ingress_replicas}", "ingress_replicas")
        if not 0 < self.drain_s < float("inf"):
            raise ConfigError(f"must be a number above 0, got {self.drain_s}", "drain_s")
        served = self.served()
        for number, model in enumerate(served):
            with section(f"models.{number}" if self.models else "model"):
                model.limits_over(self.limits)
        names = [model.name for model in served]
        if len(set(names)) < len(names):
            raise ConfigError(f"models need names of their own, got {', '.join(map(str, names))}", "models")
        default = self.app.default_model
        if default is not None and default not in names:
            raise ConfigError(f"expected one of {', '.join(names)}, got {default!r}", "app.default_model")
        if not is_loopback(self.host) and not self.insecure and not self.digests():
            raise ConfigError(
                f"other machines can reach {self.host}: set API keys (app.api_keys, or the environment variable "
                f"{KEYS}), or insecure: true",
                "host",
            )

    def served(self) -> list[ServedModel]:
        """The models.

        Raises:
            ConfigError: there is none, one has no path, or both `model` and `models` are given.
        """
        if self.models and self.model.path is not None:
            raise ConfigError("give model or models, not both", "model")
        models = self.models or [self.model]
        for number, model in enumerate(models):
            if model.path is None:
                where = f"models.{number}.path" if self.models else "model.path"
                raise ConfigError("name the model, e.g. --model.path outputs/digits/final", where)
        return models

    def digests(self) -> tuple[str, ...]:
        """SHA-256 of each key that opens the server, those of the environment among them; none: it is open."""
        plain = re.split(r"[,\s]+", os.environ.get(KEYS, ""))
        if not all(key.isascii() and key.isprintable() for key in plain):  # no header can carry others
            raise ConfigError(f"the environment variable {KEYS} holds a key with other than ASCII characters")
        hashed = (hashlib.sha256(key.encode()).hexdigest() for key in plain if key)
        return tuple(dict.fromkeys([*self.app.api_keys, *hashed]))

    def settings(self) -> AppSettings:
        """The HTTP side's settings, with all keys; a request has no more prompts than every queue has room for."""
        room = min(model.limits_over(self.limits).max_queue for model in self.served())
        return replace(self.app, api_keys=self.digests(), max_prompts=min(self.app.max_prompts, room))


def serve_config(arguments: Mapping[str, Any]) -> ServeConfig:
    """Settings from the arguments of `serve run` or `serve deploy`.

    Args:
        arguments: `config` names a YAML file; anything else is a setting, by its dotted name or as a nested mapping,
            and overrides the file.

    Raises:
        ConfigError: unknown key, wrong type, impossible combination, bad file.
    """
    given = dict(arguments)
    file = given.pop("config", None)
    options = [
        f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in flatten(given).items()
    ]
    return parse(ServeConfig, [*(["--config", str(file)] if file else []), *options], "serve", "Serves models.")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name_for(path: str, adapter: str | None) -> str:
    """A name for a model that has none."""
    if path.startswith(REGISTRY):
        name = re.split("[/@]", path.removeprefix(REGISTRY))[0]
    elif path.startswith(("/", "~", ".")):
        parts = [part for part in Path(path).parts if part not in ("/", "..")]
        name = next((part for part in reversed(parts) if part not in _UNTELLING), "model")
    else:
        name = path
    return name if adapter is None else f"{name}+{_name_for(adapter, None).rpartition('/')[2]}"
