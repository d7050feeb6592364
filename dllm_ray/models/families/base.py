"""What a family is: data about one kind of published checkpoint, and how it maps onto a transformers architecture."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dllm_ray.errors import ModelError
from dllm_ray.models.mapping import Rule
from dllm_ray.models.spec import Padding

_REQUIRED = object()


class Fields:
    """The fields of a published config.json, with clear errors for those that don't fit.

    Args:
        values: the file's content.
        where: the checkpoint, for messages.
        family: what the checkpoint is taken for, for messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str, family: str):
        self._values = values
        self._where = where
        self._family = family

    def get(self, name: str, default: Any = None) -> Any:
        """A field; `default` where it is absent or null."""
        value = self._values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """A field that must be there.

        Raises:
            ModelError: it is absent or null.
        """
        value = self._values.get(name)
        if value is None:
            raise ModelError(f"{self._where}: config.json has no {name}, which a {self._family} checkpoint needs")
        return value

    def require(self, name: str, *allowed: Any, default: Any = _REQUIRED, why: str) -> None:
        """Makes sure that a field has one of the values that can be mapped exactly.

        Args:
            name: the field.
            allowed: the values that fit.
            default: what an absent or null field means; by default it fits.
            why: what else the architecture would need.

        Raises:
            ModelError: it has another value.
        """
        value = self._values.get(name)
        if value is None:
            value = allowed[0] if default is _REQUIRED else default
        if value not in allowed:
            expected = " or ".join(map(repr, allowed))
            raise ModelError(
                f"{self._where}: {name} is {value!r}; a {self._family} checkpoint can only be mapped exactly with "
                f"{expected}: {why}"
            )

    def refuse(self, problem: str) -> ModelError:
        """The error for a checkpoint that can't be mapped exactly; to be raised."""
        return ModelError(f"{self._where}: this {self._family} checkpoint can't be mapped exactly: {problem}")

    def rope(self, default_theta: float, partial: float | None = None) -> dict[str, Any]:
        """`rope_parameters` of transformers 5, from these or from the older `rope_theta` and `rope_scaling`."""
        stored = self.get("rope_parameters") or self.get("rope_scaling") or {}
        if not isinstance(stored, Mapping):
            raise self.refuse(f"rope_scaling is {stored!r}; expected a mapping")
        rope = {"rope_type": "default", "rope_theta": self.get("rope_theta", default_theta)} | stored
        rope["rope_type"] = rope.pop("type", None) or rope["rope_type"]
        return rope if partial is None else rope | {"partial_rotary_factor": partial}

    def take(self, *names: str) -> dict[str, Any]:
        """The fields of these names that are there."""
        return {name: self._values[name] for name in names if self._values.get(name) is not None}


@dataclass(frozen=True)
class Family:
    """One kind of published checkpoint."""

    name: str
    """Its name in a `DiffusionSpec`."""
    native: str
    """The `model_type` of the transformers architecture it maps onto."""
    model_types: tuple[str, ...]
    """The `model_type` of its config.json; families that share one are told apart by `architectures`."""
    architectures: tuple[str, ...] = ()
    """The classes that its config.json names."""
    config: Callable[[Fields], dict[str, Any]] | None = None
    """Published config -> fields of the native one. Raises `ModelError` for what can't be mapped exactly. None: the
    family is native, and transformers reads its config.json as it is."""
    rules: tuple[Rule, ...] = ()
    """How its tensors map; those that no rule names keep their names."""
    vocabulary: tuple[str, ...] = ("vocab_size",)
    """Fields of its config.json that count the rows of the embeddings."""
    shift_logits: bool = False
    """Whether the logits at a position predict the token to its right."""
    attention: Literal["full", "block_causal"] = "full"
    """What a position may see."""
    block_field: str | None = None
    """Field of its config.json with the block size, where attention is block-causal."""
    block_size: int | None = None
    """Block size where `block_field` is absent."""
    block_name: str | None = None
    """Word in the names of checkpoints with block-causal attention, for a family whose config.json doesn't tell."""
    mask_token: str | None = None
    """Text of the mask token, where the tokenizer doesn't name one."""
    mask_token_id: int | None = None
    """Published id of the mask token, where neither config.json nor the tokenizer names one."""
    eot_token: str | None = None
    """Token that ends an assistant's turn."""
    eot_text: str | None = None
    """Text that ends an assistant's turn, where no single token does."""
    chat_template: str | None = None
    """Template for tokenizers that have none."""
    replace_template: bool = False
    """Whether `chat_template` also replaces the tokenizer's own, because that one is known to be wrong."""
    thinking_off: bool = False
    """Whether its template thinks aloud unless told not to, and the model was trained not to."""
    uniform_noise: bool = False
    """Whether it has no mask token: noise is drawn from the whole vocabulary."""
    edit_heads: Mapping[str, Any] | None = None
    """Of a family whose models edit: `DiffusionSpec.edit_heads`."""
    sampler: Mapping[str, Any] = field(default_factory=dict)
    """Default sampler settings, by the names of `SamplerConfig`."""
    padding: Padding = "eos"
    """How the family's own recipe fills up rows in training (`data.padding`)."""
    lora_targets: tuple[str, ...] | str = "all-linear"
    """Native modules that LoRA adapts by default; `all-linear` is every linear layer but the head."""

    def blocks(self, config: Mapping[str, Any], path: str) -> int | None:
        """Block size of the checkpoint at `path` with this config.json; None where attention is full."""
        named = self.block_name is not None and self.block_name in Path(path).name.lower()
        if self.attention == "full" and not named:
            return None
        return (config.get(self.block_field) if self.block_field else None) or self.block_size

    def sampler_for(self, config: Mapping[str, Any], path: str) -> dict[str, Any]:
        """Default sampler settings of the checkpoint at `path` with this config.json."""
        size = self.blocks(config, path)
        return dict(self.sampler) | ({} if size is None else {"block_size": size, "cache": "block"})

    def padding_for(self, config: Mapping[str, Any], path: str) -> Padding:
        """How the recipe of the checkpoint at `path` with this config.json fills up rows; one that only its name says
        to be block-causal was trained in whole blocks."""
        return "block" if self.attention == "full" and self.blocks(config, path) else self.padding

    @property
    def is_native(self) -> bool:
        """Whether transformers reads its checkpoints as they are."""
        return self.config is None
