"""How a model is spread over workers: one module for each strategy, behind the interface of `base.Strategy`."""

from dllm_ray.models.lm import DiffusionLM
from dllm_ray.training.config import TrainConfig
from dllm_ray.training.strategies.base import Strategy
from dllm_ray.training.strategies.ddp import DDP

_STRATEGIES = {"ddp": DDP}


def wrap(lm: DiffusionLM, config: TrainConfig) -> Strategy:
    """The strategy that `config.strategy` names, around a model that lies on its training device."""
    return _STRATEGIES[config.strategy](lm, config)
