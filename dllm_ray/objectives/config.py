"""Settings of the training objective."""

import dataclasses
from dataclasses import dataclass
from typing import Literal

from dllm_ray.errors import ConfigError

_CHOICES = {
    "name": ("mdlm", "bd3lm", "edit_flow"),
    "schedule": ("linear", "cosine"),
    "weight": ("schedule", "uniform", "cart"),
    "norm": ("token", "sequence", "batch", "masked"),
    "kappa": ("linear", "cubic", "cosine"),
}
_BEGINNINGS = ("empty", "masks", "uniform", "noised")
_MASKING = ("schedule", "weight", "cart_p", "noise_range", "block_size", "block_times")
_EDITING = ("kappa", "max_weight", "x0", "x0_length", "x0_noise", "edit_time")


@dataclass
class ObjectiveConfig:
    """What training minimises."""

    name: Literal["mdlm", "bd3lm", "edit_flow"] = "mdlm"
    """mdlm: masked diffusion over the whole row (arXiv 2406.07524, LLaDA arXiv 2502.09992); bd3lm: block diffusion,
    each block given the clean blocks before it (arXiv 2503.09573); edit_flow: insertions, deletions and substitutions
    (arXiv 2506.09018), for a model with edit heads; one that has none gets them."""
    schedule: Literal["linear", "cosine"] = "linear"
    """Share of clean tokens over time: 1 - t, or 1 - cos(pi/2 (1 - t))."""
    weight: Literal["schedule", "uniform", "cart"] = "schedule"
    """Weight of a masked token's cross-entropy. schedule: -alpha'/(1-alpha), which makes the loss an ELBO; uniform: 1;
    cart: more for tokens with clean ones close by (Dream, arXiv 2508.15487; mdlm only)."""
    cart_p: float = 0.3
    """Of `weight: cart`: how fast the weight of a clean token falls with its distance, between 0 and 1."""
    norm: Literal["token", "sequence", "batch", "masked"] | None = None
    """What the summed loss is divided by, over the global batch: target tokens; each sample's own target tokens, then
    samples; samples; or masked tokens. Without packing a sample is a row. null: token; for edit_flow sequence. To
    edit_flow the prompt's tokens count too, and masked means nothing."""
    time_epsilon: float = 1e-3
    """Smallest time drawn, in [0, 1); keeps the schedule's weight in bounds. For edit_flow, whose time runs the other
    way, 1 minus the largest."""
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
    """Masked positions (for edit_flow, edits of a kind) whose vocabulary logits are held at a time. More of them take a
    second pass through the vocabulary head in backward; the loss is the same."""
    kappa: Literal["linear", "cubic", "cosine"] = "cubic"
    """Share of edits made over time: t, 2t^3 - 3t^2 + 2t, or 1 - cos(pi/2 t); edit_flow only, as all that follows."""
    max_weight: float | None = 20.0
    """Most that kappa'/(1-kappa) weighs a row; null: no bound."""
    x0: tuple[Literal["empty", "masks", "uniform", "noised"], ...] = ("empty",)
    """What follows the prompt at time 0; of several, each row draws one. empty: nothing; masks: `x0_length` mask
    tokens; uniform: as many tokens drawn from the vocabulary; noised: the answer with mistakes and without its end, to
    learn to repair drafts."""
    x0_length: int = 64
    """Tokens of `x0` masks and uniform."""
    x0_noise: float = 0.3
    """Of `x0` noised: share of the answer's tokens that are replaced (by others of the batch), dropped or doubled."""
    edit_time: bool = False
    """Whether heads that are made for this training are told the time. Without, one forward serves as many steps as
    change nothing."""

    def __post_init__(self):
        if self.norm is None:
            self.norm = "sequence" if self.name == "edit_flow" else "token"
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
        self._check_edits()
        if self.name == "mdlm" and self.block_times:
            raise ConfigError("mdlm has no blocks; use bd3lm, or leave it out", "block_times")
        if self.name == "bd3lm" and self.weight == "cart":
            raise ConfigError(
                "cart counts clean tokens on both sides, of which bd3lm shows one side only; use schedule or uniform",
                "weight",
            )

    def _check_edits(self) -> None:
        self.x0 = tuple(self.x0)
        if not self.x0 or not set(self.x0) <= set(_BEGINNINGS):
            raise ConfigError(f"expected some of {', '.join(_BEGINNINGS)}, got {list(self.x0)}", "x0")
        if self.x0_length < 1:
            raise ConfigError(f"must be at least 1, got {self.x0_length}", "x0_length")
        if not 0 < self.x0_noise <= 1:
            raise ConfigError(f"must lie above 0 and at most at 1, got {self.x0_noise}", "x0_noise")
        if self.max_weight is not None and not self.max_weight > 0:
            raise ConfigError(f"must be above 0, or null for no bound, got {self.max_weight}", "max_weight")
        if self.name == "edit_flow" and self.norm == "masked":
            raise ConfigError("edit_flow masks nothing: expected token, sequence or batch", "norm")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _MASKING if self.name == "edit_flow" else _EDITING:
            if getattr(self, name) != defaults[name]:
                raise ConfigError(f"has no effect on {self.name}: leave it out", name)
