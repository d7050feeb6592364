"""How a model is spread over workers: one module for each strategy, behind the interface of `base.Strategy`.

`check` imports nothing heavy, so jobs can call it before any work.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dllm_ray.errors import ConfigError
from dllm_ray.training.config import TrainConfig

if TYPE_CHECKING:
    from dllm_ray.models.lm import DiffusionLM
    from dllm_ray.training.strategies.base import Strategy


def check(config: TrainConfig, quantization: str | None) -> None:
    """Makes sure that a strategy takes the model's weights.

    Args:
        config: names the strategy.
        quantization: `model.quantization`.

    Raises:
        ConfigError: quantized weights, and a strategy that would cut them into flat pieces.
    """
    if quantization is not None and config.strategy != "ddp":
        raise ConfigError(
            f"{config.strategy} can't shard weights in {quantization}; expected ddp, where only the adapter's "
            "gradients and optimizer state take room beside them",
            "strategy",
        )


def wrap(lm: DiffusionLM, config: TrainConfig) -> Strategy:
    """The strategy that `config.strategy` names, around a model that lies on its training device.

    Raises:
        ConfigError: activation checkpointing is asked for, and the architecture has none.
    """
    if config.activation_checkpointing:
        _checkpoint_activations(lm)
    if config.strategy == "ddp":
        from dllm_ray.training.strategies.ddp import DDP

        return DDP(lm, config)
    if config.strategy == "fsdp2":
        from dllm_ray.training.strategies.fsdp2 import FSDP2

        return FSDP2(lm, config)
    from dllm_ray.training.strategies.deepspeed import DeepSpeed

    return DeepSpeed(lm, config)


def _checkpoint_activations(lm: DiffusionLM) -> None:
    """Each transformer layer keeps only its input and computes the rest again in the backward pass."""
    try:
        lm.model.activation_checkpointing_enable()
    except ValueError:
        raise ConfigError(f"{lm.architecture} has no activation checkpointing", "activation_checkpointing") from None
