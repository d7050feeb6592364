"""Where a trained model comes from: a file in its directory names its MLflow run, its data and its step."""

import json
from pathlib import Path
from typing import Any

PROVENANCE = "provenance.json"
"""Name of the file."""


def read_provenance(model: str | None) -> dict[str, Any]:
    """The provenance of a model directory; empty where it has none."""
    path = Path(model or "") / PROVENANCE
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
