"""`DiffusionSpec`: the few facts about a model that a denoiser needs. Plain data, kept in `config.json`."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dllm_ray.errors import ModelError

CONFIG_KEY = "diffusion"
"""The key of `config.json` under which the spec is stored."""

IGNORE_INDEX = -100
"""Label of a position that carries no loss and is never masked, as in transformers and torch."""


@dataclass(frozen=True)
class DiffusionSpec:
    """What samplers and objectives must know of a model beside its logits."""

    family: str
    """The kind of checkpoint, by `model_type`: `bert`, `modernbert`, `qwen3`, ..."""
    mask_token_id: int
    """The token that stands for "not yet written"."""
    eos_token_id: int
    """End of text; padding after an answer is made of it when `data.padding` is `eos`."""
    pad_token_id: int
    """Fills rows up to a common width; may equal `eos_token_id`. No mask is ever derived from it."""
    bos_token_id: int | None = None
    """First token of a text, where the tokenizer has one; shifted logits need it for an empty prompt."""
    eot_token_id: int | None = None
    """End of an assistant's turn, where the chat template closes turns with a token other than `eos_token_id`."""
    shift_logits: bool = False
    """Whether the logits at a position predict the token to its right (models adapted from autoregressive ones)."""

    @property
    def stop_token_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion."""
        if self.eot_token_id is None or self.eot_token_id == self.eos_token_id:
            return (self.eos_token_id,)
        return (self.eos_token_id, self.eot_token_id)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any], where: str = "config.json") -> "DiffusionSpec":
        """Reads a stored spec.

        Raises:
            ModelError: no mapping, an unknown or missing key, or a token id that is not a whole number.
        """
        if not isinstance(values, dict):
            raise ModelError(f"{where}: the {CONFIG_KEY!r} section is a {type(values).__name__}; expected a mapping")
        fields = {field.name: field for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(
            name for name, field in fields.items() if field.default is dataclasses.MISSING and values.get(name) is None
        )
        wrong = sorted(
            name
            for name, value in values.items()
            if name.endswith("_token_id") and value is not None and not isinstance(value, int)
        )
        if unknown or missing or wrong:
            problems = [("unknown", unknown), ("missing", missing), ("not a token id", wrong)]
            found = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems if names)
            raise ModelError(f"{where}: the {CONFIG_KEY!r} section doesn't describe a diffusion model: {found}")
        return cls(**values)
