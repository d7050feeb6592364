"""`Limits`: what calls may ask of a served model. Plain data."""

import dataclasses
from dataclasses import dataclass

from dllm_ray.errors import ConfigError
from dllm_ray.sampling.config import SamplerConfig

CHANGEABLE = (
    ("policy", "steps", "steps_per_block", "block_size", "threshold", "factor", "cache", "cfg_scale")
    + ("temperature", "top_p", "top_k", "eos_penalty", "schedule", "alg_temperature")
    + ("kappa", "start_tokens", "edit_probability")
)  # fmt: skip
"""The sampler settings that a call may change, unless a server says otherwise, as far as they mean something to the
model."""

_COUNTS = ("max_rows", "max_tokens", "max_queue", "max_new_tokens", "max_prompt_tokens", "max_steps", "max_n")


@dataclass
class Limits:
    """What calls may ask of a served model, and how many are answered together."""

    max_rows: int = 32
    """Most texts denoised together."""
    max_tokens: int = 65536
    """Most positions of all canvases that are denoised together (prompts and answers; twice where a text is guided). A
    text that alone has more is denoised alone."""
    max_queue: int = 256
    """Most calls that wait for a place; further ones are refused at once."""
    max_new_tokens: int = 4096
    """Most tokens of an answer, or of a gap."""
    max_prompt_tokens: int | None = None
    """Most tokens of a prompt; null: as many as the model's context holds."""
    max_steps: int = 4096
    """Most denoising steps of an answer."""
    max_n: int = 8
    """Most texts of a call."""
    fields: tuple[str, ...] = CHANGEABLE
    """The sampler settings that a call may change."""

    def __post_init__(self):
        for name in _COUNTS:
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
                raise ConfigError(f"must be a whole number, at least 1, got {value!r}", name)
        self.fields = tuple(self.fields)
        known = {field.name for field in dataclasses.fields(SamplerConfig)}
        for name in self.fields:
            if name not in known:
                raise ConfigError(f"{name!r} is no sampler setting: see SamplerConfig", "fields")
