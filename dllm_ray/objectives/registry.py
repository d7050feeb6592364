"""Objectives by name."""

import dataclasses

from dllm_ray.models.spec import DiffusionSpec
from dllm_ray.objectives.bd3lm import BD3LM
from dllm_ray.objectives.config import ObjectiveConfig
from dllm_ray.objectives.masked import MaskedDiffusion
from dllm_ray.objectives.mdlm import MDLM

_OBJECTIVES = {objective.name: objective for objective in (MDLM, BD3LM)}


def build(config: ObjectiveConfig, spec: DiffusionSpec) -> MaskedDiffusion:
    """The objective that a config describes, for a model with this spec.

    Raises:
        ConfigError: the model has no mask token.
    """
    settings = dataclasses.asdict(config)
    return _OBJECTIVES[settings.pop("name")](spec, **settings)
