"""The dashboards as Grafana would read them, and what our code exports."""

import importlib.util
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DASHBOARDS = {path.stem: json.loads(path.read_text()) for path in (ROOT / "dashboards" / "grafana").glob("*/*.json")}
MATCHER = re.compile(r'(\w+)(=~|!~|!=|=)"([^"]*)"')


def builder():
    """dashboards/grafana/build.py as a module."""
    path = ROOT / "dashboards" / "grafana" / "build.py"
    spec = importlib.util.spec_from_file_location("build_dashboards", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels that show something: all but the rows' headings."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str, str]]:
    """(dashboard, panel, expression) of all panels."""
    for name, dashboard in DASHBOARDS.items():
        for panel in panels(dashboard):
            for target in panel["targets"]:
                yield name, panel["title"], target["expr"]


def variables(dashboard: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The template variables by name."""
    return {variable["name"]: variable for variable in dashboard["templating"]["list"]}


def metric_names(expression: str) -> set[str]:
    """The metrics that an expression asks for."""
    bare = re.sub(r'"[^"]*"', '""', expression)
    return set(re.findall(r"\bray_\w+", bare))
