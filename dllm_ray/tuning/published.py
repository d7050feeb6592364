"""Published curves of accuracy over parallelism as data, to stand behind those of a sweep. The data is
`aup_published.yaml`."""

import difflib
from functools import cache
from pathlib import Path
from typing import Any

from dllm_ray.config import load_yaml
from dllm_ray.errors import ConfigError


def names() -> list[str]:
    """What `curves` knows: model and task, e.g. `llada/GSM8K-CoT`."""
    return [f"{model}/{task}" for model, tasks in _tree()["curves"].items() for task in tasks]


def curves(name: str) -> dict[str, list[tuple[float, float]]]:
    """The published curves of one task.

    Args:
        name: model that the methods build on, and task: one of `names`.

    Returns:
        Method -> pairs of tokens per forward and accuracy in percent, from slow to fast.

    Raises:
        ConfigError: there are none of that name.
    """
    known = names()
    if name not in known:
        folded = {other.lower(): other for other in known}
        near = [folded[word] for word in difflib.get_close_matches(name.lower(), folded, n=3, cutoff=0.5)]
        nearest = f"the nearest: {', '.join(near)}; " if near else ""
        raise ConfigError(f"no published curves {name!r}; {nearest}there are: {', '.join(known)}", "sweep.background")
    model, _, task = name.partition("/")
    return {
        method: sorted((float(tpf), float(accuracy)) for tpf, accuracy in pairs)
        for method, pairs in _tree()["curves"][model][task].items()
    }


def source() -> str:
    """Who published the curves, and where."""
    return _tree()["source"]


@cache
def _tree() -> dict[str, Any]:
    return load_yaml(Path(__file__).with_name("aup_published.yaml"))
