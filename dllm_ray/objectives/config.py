"""Settings of the training objective."""

from dataclasses import dataclass
from typing import Literal

from dllm_ray.errors import ConfigError

_CHOICES = {
    "name": ("mdlm", "bd3lm"),
    "schedule": ("linear", "cosine"),
    "weight": ("schedule", "uniform", "cart"),
    "norm": ("token", "sequence", "batch", "masked"),
}


@dataclass
class ObjectiveConfig:
    """What training minimises."""

    name: Literal["mdlm", "bd3lm"] = "mdlm"
    """mdlm: masked diffusion over the whole row (arXiv 2406.07524, LLaDA arXiv 2502.09992); bd3lm: block diffusion,
    each block given the clean blocks before it (arXiv 2503.09573)."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Share of clean tokens over time: 1 - t, or 1 - cos(pi/2 (1 - t))."""
    weight: Literal["schedule", "uniform", "cart"] = "schedule"
    """Weight of a masked token's cross-entropy. schedule: -alpha'/(1-alpha), which makes the loss an ELBO; uniform: 1;
    cart: more for tokens with clean ones close by (Dream, arXiv 2508.15487; mdlm only)."""
    cart_p: float = 0.3
    """Of `weight: cart`: how fast the weight of a clean token falls with its distance, between 0 and 1."""
    norm: Literal["token", "sequence", "batch", "masked"] = "token"
    """What the summed loss is divided by, over the global batch: target tokens; each sample's own target tokens, then
    samples; samples; or masked tokens. Without packing a sample is a row."""
    time_epsilon: float = 1e-3
    """Smallest time drawn, in [0, 1); keeps the schedule's weight in bounds."""
    noise_range: tuple[float, float] | None = None
    """Lowest and highest mask probability, drawn evenly in between; replaces `time_epsilon`. With the schedule's weight
    the loss is then an ELBO over that range of times only."""
    stratified: bool = True
    """Spread the times of a global batch evenly: less variance, the same mean."""
    block_size: int = 32
    """Positions in a block, counted from each sample's first; bd3lm only."""
    block_times: bool = False
    """A time for each block, as in the paper, where one for each sample is usual; bd3lm only."""
    logits_at_once: int = 512
    """Masked positions whose vocabulary logits are held at a time. More of them take a second pass through the
    vocabulary head in backward; the loss is the same."""

    def __post_init__(self):
        for name, known in _CHOICES.items():
            if getattr(self, name) not in known:
                raise ConfigError(f"expected one of {', '.join(known)}, got {getattr(self, name)!r}", name)
        if not 0 <= self.time_epsilon < 1:
            raise ConfigError(f"must be at least 0 and below 1, got {self.time_epsilon}", "time_epsilon")
        if not 0 < self.cart_p < 1:
            raise ConfigError(f"must lie between 0 and 1, got {self.cart_p}", "cart_p")
        for name in ("block_size", "logits_at_once"):
            if getattr(self, name) < 1:
                raise ConfigError(f"must be at least 1, got {getattr(self, name)}", name)
        if self.noise_range is not None:
            self.noise_range = tuple(self.noise_range)
            if len(self.noise_range) != 2 or not 0 <= self.noise_range[0] < self.noise_range[1] <= 1:
                raise ConfigError(
                    f"expected [low, high] with 0 <= low < high <= 1, got {list(self.noise_range)}", "noise_range"
                )
            if self.schedule != "linear":
                raise ConfigError(
                    f"gives the mask probability itself, which the {self.schedule} schedule would bend; use linear",
                    "noise_range",
                )
        if self.name == "mdlm" and self.block_times:
            raise ConfigError("mdlm has no blocks; use bd3lm, or leave it out", "block_times")
        if self.name == "bd3lm" and self.weight == "cart":
            raise ConfigError(
                "cart counts clean tokens on both sides, of which bd3lm shows one side only; use schedule or uniform",
                "weight",
            )
