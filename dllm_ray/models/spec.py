"""`DiffusionSpec`: the few facts about a model that a denoiser needs. Plain data, kept in `config.json`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from dllm_ray.errors import ModelError

CONFIG_KEY = "diffusion"
"""The key of `config.json` under which the spec is stored."""

ORIGINAL_KEY = "original_config"
"""The key of a native `config.json` under which the published one is kept, to convert back."""

IGNORE_INDEX = -100
"""Label of a position that carries no loss and is never masked, as in transformers and torch."""

Padding = Literal["eos", "ignore", "block", "eos_block"]
"""How rows of a batch are filled up in training; `data.batches.PaddingRule` says what each means."""


@dataclass(frozen=True)
class DiffusionSpec:
    """What samplers and objectives must know of a model beside its logits."""

    family: str
    """The kind of checkpoint, by `model_type`: `bert`, `modernbert`, `qwen3`, ..."""
    mask_token_id: int | None
    """The token that stands for "not yet written"; None where noise is drawn from the whole vocabulary."""
    eos_token_id: int
    """End of text; padding after an answer is made of it when `data.padding` is `eos`."""
    pad_token_id: int
    """Fills rows up to a common width; may equal `eos_token_id`. No mask is ever derived from it."""
    bos_token_id: int | None = None
    """First token of a text, where the tokenizer has one; shifted logits need it for an empty prompt."""
    eot_token_id: int | None = None
    """End of an assistant's turn, where the chat template closes turns with a token other than `eos_token_id`."""
    eot_text: str | None = None
    """Text that ends an assistant's turn, where no single token does; answers are cut there."""
    shift_logits: bool = False
    """Whether the logits at a position predict the token to its right (models adapted from autoregressive ones)."""
    attention: Literal["full", "block_causal"] = "full"
    """full: every position sees every other; block_causal: only its own block and earlier ones, on a grid that starts
    at position 0."""
    block_size: int | None = None
    """Positions in a block where attention is block-causal."""
    padding: Padding = "eos"
    """How the model's own recipe fills up rows in training; `data.padding` overrides it."""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """Default sampler settings, by the names of `SamplerConfig`."""
    edit_heads: Mapping[str, Any] | None = None
    """Of a model that edits (`models.edit_heads`): `time`, whether its heads depend on the time; `reads`, the module of
    the trunk whose input they read, or null for the trunk's output. None: it has no such heads."""

    def __post_init__(self):
        for name, known in (("attention", ("full", "block_causal")), ("padding", get_args(Padding))):
            if getattr(self, name) not in known:
                raise ModelError(f"{name}: expected {' or '.join(known)}, got {getattr(self, name)!r}")
        if self.attention == "block_causal" and not (isinstance(self.block_size, int) and self.block_size > 0):
            raise ModelError(
                f"block_size: block-causal attention needs a whole number above 0, got {self.block_size!r}"
            )

        if self.edit_heads is not None and (
            not isinstance(self.edit_heads, Mapping) or set(self.edit_heads) != {"time", "reads"}
        ):
            raise ModelError(f"edit_heads: expected a mapping of time and reads, got {self.edit_heads!r}")

    @property
    def grid(self) -> int | None:
        """Block size of block-causal attention; None where attention is full."""
        return self.block_size if self.attention == "block_causal" else None

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
        wrong_section = f"{where}: the {CONFIG_KEY!r} section doesn't describe a diffusion model"
        fields = {item.name: item for item in dataclasses.fields(cls)}
        unknown = sorted(set(values) - set(fields))
        missing = sorted(
            name
            for name, item in fields.items()
            if item.default is item.default_factory is dataclasses.MISSING
            and (name not in values if name == "mask_token_id" else values.get(name) is None)
        )
        wrong = sorted(
            name
            for name, value in values.items()
            if name.endswith("_token_id") and value is not None and not isinstance(value, int)
        )
        if unknown or missing or wrong:
            problems = [("unknown", unknown), ("missing", missing), ("not a token id", wrong)]
            found = "; ".join(f"{what}: {', '.join(names)}" for what, names in problems if names)
            raise ModelError(f"{wrong_section}: {found}")
        try:
            return cls(**values)
        except ModelError as error:
            raise ModelError(f"{wrong_section}: {error}") from None
