"""Objectives by name."""

import dataclasses

from dllm_ray.errors import ConfigError
from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.objectives.batch import Objective
from dllm_ray.objectives.bd3lm import BD3LM
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.objectives.mdlm import MDLM

_MASKED = {objective.name: objective for objective in (MDLM, BD3LM)}


def build(
    config: ObjectiveConfig,
    spec: DiffusionSpec,
    vocabulary: int | None = None,
    longest: int | None = None,
    seed: int = 0,
) -> Objective:
    """The objective that a config describes, for a model with this spec.

    Args:
        config: the settings.
        spec: the model's facts.
        vocabulary, longest, seed: as of `EditFlow`; masked diffusion doesn't ask.

    Raises:
        ConfigError: the model has no mask token, or edit heads that the objective wouldn't train.
    """
    settings = dataclasses.asdict(config)
    name = settings.pop("name")
    if name == "edit_flow":
        from dllm_ray.objectives.edit_flow import EditFlow  # with a compiler, which other objectives can do without

        return EditFlow(spec, vocabulary=vocabulary, longest=longest, seed=seed, **settings)
    if spec.edit_heads is not None:
        raise ConfigError("the model has edit heads, which only edit_flow trains", "name")
    return _MASKED[name](spec, **settings)
