"""What a training checkpoint holds, and how a finished one becomes `final/`.

    config.yaml   the run's resolved settings
    state.json    step, validation nll, and where the data stand
    model/        the model as a Hugging Face directory: always with ddp, in the last checkpoint and in those that are
                  looked at (`observe`) with strategies that keep shards
    ...           what the strategy needs to go on: optimizer state, shards

The noise follows from the seed and the step (`loop`), so nothing else is needed to go on.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dllm_ray.config import to_yaml
from dllm_ray.models.provenance import PROVENANCE
from dllm_ray.output import replace_directory
from dllm_ray.training.strategies.base import MODEL, Strategy

STATE = "state.json"
SETTINGS = "config.yaml"


def save(
    directory: Path, strategy: Strategy, settings: Mapping[str, Any], state: Mapping[str, Any], model: bool
) -> None:
    """Writes a checkpoint; every worker calls it with a folder of its own.

    Args:
        directory: where to write this worker's part.
        strategy: holds model and optimizer.
        settings: the run's resolved settings.
        state: what else the run needs to go on.
        model: whether the model must be there as a Hugging Face directory, for others to load.
    """
    strategy.save(directory)
    if model and not (directory / MODEL).is_dir():  # ddp's own state holds it
        strategy.export(directory / MODEL)
    if strategy.rank == 0:
        (directory / SETTINGS).write_text(to_yaml(settings), encoding="utf-8")
        (directory / STATE).write_text(json.dumps(dict(state)), encoding="utf-8")


def restore(directory: Path, strategy: Strategy) -> dict[str, Any]:
    """Restores a checkpoint and returns its state."""
    strategy.load(directory)
    return json.loads((directory / STATE).read_text(encoding="utf-8"))


def export(checkpoint: Path, target: Path, card: str, provenance: Mapping[str, Any]) -> None:
    """Turns a checkpoint into a plain Hugging Face directory, complete or not there at all.

    Args:
        checkpoint: the folder of a checkpoint that holds the model.
        target: the directory to make; an older one is replaced.
        card: text of its README.md.
        provenance: where the model comes from: run, data, settings.
    """
    temporary = target.with_name(f"{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(checkpoint / MODEL, temporary)
    shutil.copy(checkpoint / SETTINGS, temporary)
    (temporary / "README.md").write_text(card, encoding="utf-8")
    (temporary / PROVENANCE).write_text(json.dumps(dict(provenance), indent=2, default=str), encoding="utf-8")
    replace_directory(temporary, target)
