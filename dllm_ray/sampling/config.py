"""`SamplerConfig`: every setting of the denoising loop. Plain data."""

from dataclasses import dataclass
from typing import Literal

from dllm_ray.errors import ConfigError


@dataclass
class SamplerConfig:
    """How a canvas of masks becomes text."""

    max_new_tokens: int | None = 128
    """Masks put after each prompt; null: as many as `max_length` leaves beside the longest prompt of the call."""
    max_length: int | None = None
    """Prompt and answer together, in tokens; read only when `max_new_tokens` is null."""
    steps: int = 128
    """Denoising steps for the whole answer, divided evenly over its blocks (rounded up)."""
    steps_per_block: int | None = None
    """Denoising steps for each block; overrides `steps`."""
    block_size: int | None = 32
    """Tokens in a block; blocks are finished from left to right. null: one block."""
    schedule: Literal["linear", "cosine"] = "linear"
    """How many tokens each step of a block commits: evenly, or few at first and more towards the end."""
    temperature: float = 0.0
    """0 proposes the likeliest token; above 0 one is drawn from softmax(logits / temperature)."""
    policy: Literal["low_confidence", "random"] = "low_confidence"
    """Which masked positions a step commits: those whose proposed token is likeliest, or any."""
    cfg_scale: float = 0.0
    """Classifier-free guidance (arXiv 2207.12598): logits move away from those without the prompt; 0 is off."""
    cfg_keep_tokens: tuple[int, ...] = ()
    """Prompt tokens that the unguided forward of classifier-free guidance keeps."""
    suppress_tokens: tuple[int, ...] = ()
    """Tokens that are never proposed."""
    begin_suppress_tokens: tuple[int, ...] = ()
    """Tokens that may be proposed, but with confidence 0, so that they are committed last in their block."""
    eos_early_stop: bool = True
    """Finish a row once it holds an end-of-text token with no mask before it; the text stays the same."""
    shift_logits: bool | None = None
    """Read the logits one position to the left; null: as the model's spec says."""
    seed: int | None = None
    """Seeds each row's own draws, independent of its neighbours; null draws a seed."""

    def __post_init__(self):
        self.cfg_keep_tokens = tuple(self.cfg_keep_tokens)
        self.suppress_tokens = tuple(self.suppress_tokens)
        self.begin_suppress_tokens = tuple(self.begin_suppress_tokens)
        for name in ("max_new_tokens", "max_length", "steps", "steps_per_block", "block_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"must be at least 1, got {value}", name)
        if self.max_new_tokens is None and self.max_length is None:
            raise ConfigError("set max_new_tokens or max_length", "max_new_tokens")
        for name in ("temperature", "cfg_scale"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ConfigError(f"must be a number that is not negative, got {value}", name)
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ConfigError(f"must lie between 0 and 2^63 - 1, got {self.seed}", "seed")
        for name, known in (("policy", ("low_confidence", "random")), ("schedule", ("linear", "cosine"))):
            if getattr(self, name) not in known:
                raise ConfigError(f"expected one of {', '.join(known)}, got {getattr(self, name)!r}", name)

    def blocks(self, new_tokens: int | None = None) -> tuple[int, int]:
        """Block size and most steps in a block, for answers of `new_tokens` tokens (null: of `max_new_tokens`).

        Raises:
            ConfigError: the steps are fewer than the blocks.
        """
        new_tokens = new_tokens or self.max_new_tokens or self.max_length
        size = min(self.block_size or new_tokens, new_tokens)
        return size, self.steps_in_block(-(-new_tokens // size))

    def steps_in_block(self, blocks: int) -> int:
        """Most steps in each of `blocks` blocks.

        Raises:
            ConfigError: the steps are fewer than the blocks.
        """
        if self.steps_per_block is not None:
            return self.steps_per_block
        if self.steps < blocks:
            raise ConfigError(
                f"{self.steps} steps are fewer than the {blocks} blocks of the answer: raise steps or block_size",
                "steps",
            )
        return -(-self.steps // blocks)
