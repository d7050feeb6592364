"""Settings of the training objective."""

from dataclasses import dataclass
from typing import Literal

from dllm_ray.errors import ConfigError


@dataclass
class ObjectiveConfig:
    """What training minimises."""

    name: Literal["mdlm"] = "mdlm"
    """mdlm: masked diffusion (arXiv 2406.07524, LLaDA arXiv 2502.09992)."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Share of clean tokens over time: 1 - t, or 1 - cos(pi/2 (1 - t))."""
    weight: Literal["schedule", "uniform"] = "schedule"
    """Weight of a masked token's cross-entropy: -alpha'/(1-alpha), which makes the loss an ELBO, or 1."""
    norm: Literal["token", "sequence", "batch"] = "token"
    """What the summed loss is divided by, over the global batch: target tokens; each row's own target tokens, then
    rows; or rows."""
    time_epsilon: float = 1e-3
    """Smallest time drawn; keeps the weight finite."""
    stratified: bool = True
    """Spread the times of a global batch evenly over (0, 1): less variance, the same mean."""

    def __post_init__(self):
        if not 0 < self.time_epsilon < 1:
            raise ConfigError(f"must lie between 0 and 1, got {self.time_epsilon}", "time_epsilon")
        choices = {
            "schedule": ("linear", "cosine"),
            "weight": ("schedule", "uniform"),
            "norm": ("token", "sequence", "batch"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"expected one of {', '.join(known)}, got {getattr(self, name)!r}", name)
