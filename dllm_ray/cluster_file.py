"""A cluster file: how many workers of what size jobs run on one cluster, and where they keep things.

It is YAML in the words of the jobs' own settings, of which each job takes those that it has. What is learned, asked or
written is none of its business, so that a job's settings mean the same everywhere:

    python jobs/sft.py --config configs/sft/digits.yaml --cluster configs/clusters/shared-folder.yaml
    export DLLM_RAY_CLUSTER=configs/clusters/shared-folder.yaml    # the same for every job
"""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from dllm_ray.config import flatten, load_yaml, nearest
from dllm_ray.errors import ConfigError

VARIABLE = "DLLM_RAY_CLUSTER"
"""Environment variable that names the file where `--cluster` doesn't."""
OUTPUTS = "outputs"
"""Folder that every node reaches, below which relative output folders lie. A model named by a relative path that isn't
there is looked for below it."""
SETTINGS = (
    *("train.workers", "train.cpus_per_worker", "train.gpus_per_worker", "train.threads_per_worker"),
    *("train.strategy", "train.offload", "train.activation_checkpointing", "train.micro_batch_size"),
    *("train.max_failures", "train.storage_path", "data.cache_dir", "observe.gpus"),
    *("evaluate.workers", "evaluate.cpus_per_worker", "evaluate.gpus_per_worker", "evaluate.threads_per_worker"),
    *("evaluate.cache", "workers"),
    *("model.replicas", "model.max_replicas", "model.cpus_per_replica", "model.gpus_per_replica", "model.threads"),
    *("ingress_replicas", "tracking_uri", "tracking.uri", "tracking.artifacts"),
)
"""The settings of jobs that a cluster file may set: resources and storage."""

_FOLDERS, _MODELS = ("output_dir",), ("model.path", "model.adapter")


class ClusterFile:
    """Reads a cluster file.

    Args:
        path: the file.

    Raises:
        ConfigError: it can't be read, or sets something else than resources and storage.
    """

    def __init__(self, path: str):
        tree = load_yaml(Path(path))
        outputs = tree.pop(OUTPUTS, None)
        if outputs is not None and not (isinstance(outputs, str) and Path(outputs).expanduser().is_absolute()):
            raise ConfigError(f"{path}: {OUTPUTS}: expected the absolute path of a folder, got {outputs!r}")
        self._outputs = None if outputs is None else Path(outputs).expanduser()
        for name in flatten(tree):
            parent = name.rpartition(".")[0]  # `train.workers` may be a mapping
            if name not in SETTINGS and parent not in SETTINGS:
                raise ConfigError(
                    f"{path}: {name!r} is neither a resource nor storage, which is all that a cluster file sets"
                    f"{nearest(name, [*SETTINGS, OUTPUTS])}"
                )
        self._tree = tree

    @classmethod
    def named(cls, path: str | None) -> "ClusterFile | None":
        """The file that `--cluster`, or else the environment names; None: neither does."""
        path = path or os.environ.get(VARIABLE)
        return cls(path) if path else None

    def settings(self, names: Collection[str]) -> dict[str, Any]:
        """What it sets of a job's settings.

        Args:
            names: the job's, dotted.
        """

        def kept(tree: Mapping[str, Any], prefix: str) -> dict[str, Any]:
            found = {}
            for key, value in tree.items():
                if prefix + key in names:
                    found[key] = value
                elif isinstance(value, Mapping) and (inside := kept(value, f"{prefix}{key}.")):
                    found[key] = inside
            return found

        return kept(self._tree, "")

    def places(self, given: Mapping[str, Any]) -> dict[str, str]:
        """Settings that name a folder, as they are where it lies below the folder of outputs.

        Args:
            given: a job's settings, dotted.
        """
        if self._outputs is None:
            return {}
        moved = {}
        for name in (*_FOLDERS, *_MODELS):
            value = given.get(name)
            if isinstance(value, str) and value and not Path(value).expanduser().is_absolute():
                below = self._outputs / value
                if name in _FOLDERS or (not Path(value).exists() and below.exists()):
                    moved[name] = str(below)
        return moved
