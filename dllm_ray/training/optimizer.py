"""AdamW and the course of its learning rate. Plain PyTorch."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from dllm_ray.training.config import TrainConfig


def build_optimizer(parameters: Iterable[nn.Parameter], config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv 1711.05101) over the trainable parameters; weight decay on matrices only.

    Its learning rate is set at every step (`learning_rate`).
    """
    trainable = [parameter for parameter in parameters if parameter.requires_grad]
    groups = [
        {"params": [p for p in trainable if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in trainable if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=0.0, betas=config.betas, fused=True)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """The learning rate of step 0, 1, ..., total_steps - 1.

    It rises linearly over the first `warmup` share of the steps and then falls to 0 along half a cosine or a line, or
    stays level.
    """
    warmup = max(round(config.warmup * total_steps), 1)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    if config.lr_schedule == "constant":
        return config.learning_rate
    progress = (step - warmup) / max(total_steps - warmup, 1)
    factor = 1 - progress if config.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return config.learning_rate * factor


def update(optimizer: torch.optim.Optimizer, rate: float, finite: bool) -> None:
    """One step with a learning rate, left out where the gradient isn't finite; clears the gradient."""
    if finite:
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
