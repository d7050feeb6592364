"""Lazy re-exports, so that `import dllm_ray` and `--help` don't pay for torch and transformers."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any


def exporter(package: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """A module-level `__getattr__` that imports each public name from its module on first use.

    Args:
        package: the package's `__name__`.
        names: public name -> module that defines it.
    """

    def __getattr__(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(names[name]), name)

    return __getattr__
