"""The sampler settings that come with a model, read without torch where the model is one of ours."""

import json
from pathlib import Path
from typing import Any

from dllm_ray.errors import ModelError


def sampler_settings(folder: Path) -> dict[str, Any]:
    """Default sampler settings of a local model directory; empty for what can't be read, which loading complains of."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        stored = config.get("diffusion")
        if stored is not None:
            return dict(stored.get("sampler") or {})
        from dllm_ray.models import families

        family = families.find(config, str(folder))
        return {} if family is None else family.sampler_for(config)
    except (OSError, ValueError, AttributeError, TypeError, ModelError):
        return {}
