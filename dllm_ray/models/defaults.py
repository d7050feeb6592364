"""The sampler settings that come with a model, and whether it edits, read without torch where the model is a directory
that we wrote.
"""

import json
from pathlib import Path
from typing import Any

from dllm_ray.errors import ModelError
from dllm_ray.models.config import place


def sampler_settings(path: str) -> dict[str, Any]:
    """Default sampler settings of a model directory, an adapter's (its base's), or a hub id.

    Empty for what can't be read; loading will say why.
    """
    try:
        path = _base(place(path))
        config = _config(path)
        stored = config.get("diffusion")
        if stored is not None:
            return dict(stored.get("sampler") or {})
        from dllm_ray.models import families

        family = families.find(config, path)
        return {} if family is None else family.sampler_for(config, path)
    except (OSError, ValueError, AttributeError, TypeError, KeyError, ModelError):
        return {}


def edits(path: str) -> bool:
    """Whether a model directory, an adapter's base, or a hub id has edit heads; False for what can't be read."""
    try:
        path = _base(place(path))
        config = _config(path)
        stored = config.get("diffusion")
        if stored is not None:
            return stored.get("edit_heads") is not None
        from dllm_ray.models import families

        family = families.find(config, path)
        return family is not None and family.edit_heads is not None
    except (OSError, ValueError, AttributeError, TypeError, KeyError, ModelError):
        return False


def _base(path: str) -> str:
    """The model of an adapter directory; anything else as it is. `adapters.base_of` would need torch."""
    folder = Path(path)
    if (folder / "config.json").is_file() or not (folder / "adapter_config.json").is_file():
        return path
    return json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]


def _config(path: str) -> dict[str, Any]:
    folder = Path(path)
    if (folder / "config.json").is_file():
        return json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if folder.exists() or path.startswith((".", "/")) or path.count("/") > 1:
        return {}
    from dllm_ray.models.checkpoint import read_json

    return read_json(path, "config.json")
