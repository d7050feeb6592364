"""Published scores as data: which model got what on which benchmark, by whom, with which settings, and the source.

The data is `reference_scores.yaml`. This module finds records by a model's path and a task's name; it knows no runs.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePath
from typing import Any

from dllm_ray.config import load_yaml

KINDS = ("official", "reproduced")


@dataclass(frozen=True)
class Published:
    """One published score."""

    model: str
    """Name of the model in the source."""
    task: str
    """Name of the benchmark in the source."""
    score: float | None
    """In percent; None: an empty cell."""
    kind: str
    """`official`: by the model's authors; `reproduced`: by someone else."""
    source: str
    """Repository and file."""
    setting: str | None = None
    """The settings in the source's words."""
    when: Mapping[str, Any] = field(default_factory=dict, hash=False)
    """Dotted setting -> value that the score was had with, as far as the source says."""
    note: str | None = None
    """What a reader should know."""
    model_type: str | None = None
    """`diffusion` or `AR` (autoregressive), where the source says."""
    group: str | None = None
    """Part of the leaderboard."""
    raw_accuracy_cell: str | None = None
    """The leaderboard's cell as printed."""
    raw_second_cell: str | None = None
    """The leaderboard's second cell as printed."""


@cache
def _tree() -> dict[str, Any]:
    return load_yaml(Path(__file__).with_name("reference_scores.yaml"))


@cache
def published() -> tuple[Published, ...]:
    """Every record, in the order of the data."""
    records = []
    for table in _tree()["tables"]:
        facts = {key: value for key, value in table.items() if key not in ("scores", "cells")}
        for task, score in table["scores"].items():
            accuracy, second = table.get("cells", {}).get(task, (None, None))
            records.append(
                Published(task=task, score=score, raw_accuracy_cell=accuracy, raw_second_cell=second, **facts)
            )
    return tuple(records)


@cache
def _benchmarks() -> dict[str, str]:
    return {_plain(name): benchmark for benchmark, names in _tree()["tasks"].items() for name in (benchmark, *names)}


def benchmark(task: str) -> str:
    """The benchmark that a task belongs to, in one spelling: `gsm8k_cot` -> `GSM8K`; an unknown task as it is."""
    return _benchmarks().get(_plain(task), task)


def hub_ids() -> dict[str, str | None]:
    """Published name -> hub id; None where there is none on record."""
    return dict(_tree()["models"])


def names_of(model: str) -> list[str]:
    """The published names of a model.

    Args:
        model: a published name, a hub id, or a path whose last part, or folder in the hub's cache, is one of these.

    Returns:
        None, one, or several where a checkpoint is listed in several modes.
    """
    wanted = short_name(model).lower()
    known = {name: {name.lower(), short_name(hub_id or name).lower()} for name, hub_id in hub_ids().items()}
    return [name for name, spellings in known.items() if wanted in spellings]


def short_name(model: str) -> str:
    """The last part of a hub id or path: `GSAI-ML/LLaDA-8B-Base` -> `LLaDA-8B-Base`, also inside the hub's cache."""
    cached = re.search(r"models--[^/]+--([^/]+)/snapshots/", f"{model}/")
    return cached[1] if cached else PurePath(model).name


def find(models: Iterable[str], task: str) -> list[Published]:
    """The scores of some models, by their published names, on the benchmark of a task; empty cells are left out."""
    wanted, names = benchmark(task), set(models)
    return [
        record
        for record in published()
        if record.score is not None and record.model in names and benchmark(record.task) == wanted
    ]


def best(records: Sequence[Published], kind: str, settings: Mapping[str, Any]) -> Published | None:
    """Of several scores for one benchmark, the one whose settings contradict a run's least and agree with them most.

    Args:
        records: scores of one model on one benchmark.
        kind: `official` or `reproduced`.
        settings: dotted setting -> value, of the run.
    """

    def fit(record: Published) -> tuple[int, int]:
        known = [settings[key] == value for key, value in record.when.items() if key in settings]
        return known.count(False), -known.count(True)

    return min((record for record in records if record.kind == kind), key=fit, default=None)


def _plain(name: str) -> str:
    return re.sub("[-_]", "", name).lower()
