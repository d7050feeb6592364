"""What a checkpoint is, from its config.json alone: a published family, or a model of transformers; its native config,
the transformers class it loads into, and its spec."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from dllm_ray.errors import ModelError, first_line
from dllm_ray.models import families
from dllm_ray.models.checkpoint import Checkpoint
from dllm_ray.models.edit_heads import add
from dllm_ray.models.families import Family
from dllm_ray.models.lm import usable_positions
from dllm_ray.models.spec import CONFIG_KEY, ORIGINAL_KEY, DiffusionSpec
from dllm_ray.models.tokenizers import end_of_turn_id, load_tokenizer, mask_id, prepare

_BIDIRECTIONAL_LAYERS = {"full_attention", "attention"}


@dataclass(frozen=True)
class Blueprint:
    """What a checkpoint is, from its config.json alone."""

    path: str
    """Where it lies."""
    raw: dict[str, Any]
    """Its config.json."""
    family: Family | None
    """The published family it belongs, or belonged, to; None: an ordinary model of transformers."""
    config: Any
    """The config of the transformers architecture."""
    model_class: type
    """The transformers class that it loads into."""
    is_decoder: bool
    """Whether that is an autoregressive architecture, made bidirectional."""

    @property
    def is_published(self) -> bool:
        """Whether it is in a family's own layout, to be mapped; else transformers reads it as it is."""
        return self.family is not None and not self.family.is_native and CONFIG_KEY not in self.raw

    @property
    def max_length(self) -> int | None:
        """Longest sequence, in tokens; None when its config states no limit."""
        return usable_positions(self.config)

    @property
    def edit_heads(self) -> Mapping[str, Any] | None:
        """`DiffusionSpec.edit_heads` of the model."""
        if self.is_published:
            return self.family.edit_heads
        return (self.raw.get(CONFIG_KEY) or {}).get("edit_heads")

    def tokenizer(self):
        """Its tokenizer, as published.

        Raises:
            ModelError: there is none, or it can't be read.
        """
        return load_tokenizer(self.path, self.family.native if self.is_published else None)

    def prepare(self, tokenizer):
        """Adds to its tokenizer, in place, what it lacks; one that we saved has its final tokens and template."""
        published = self.is_published or (self.family is not None and self.family.is_native)
        return prepare(tokenizer, self.family if published else None, self.raw)

    def skeleton(self):
        """The model without weights, on the `meta` device.

        Raises:
            ModelError: the architecture can't be built with this config.
        """
        try:
            with torch.device("meta"):
                model = self.model_class(self.config)
                if self.edit_heads is not None:
                    add(model, self.edit_heads)
                return model
        except Exception as error:  # every architecture checks its fields at places of its own
            raise ModelError(f"{self.path}: config.json can't be used: {first_line(error)}") from error


def resolve(checkpoint: Checkpoint) -> Blueprint:
    """Says what a checkpoint is, from its config.json.

    Raises:
        ModelError: an unknown architecture, or one that can't be mapped exactly or can't be made bidirectional.
    """
    import transformers
    from transformers import CONFIG_MAPPING, AutoConfig

    path, raw = checkpoint.path, checkpoint.config
    names = raw.get("architectures") or []
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise ModelError(f"{path}: architectures in config.json is {names!r}; expected a list of class names")
    mask = raw.get("mask_token_id")
    if mask is not None and (not isinstance(mask, int) or mask < 0):
        raise ModelError(f"{path}: mask_token_id in config.json is {mask!r}; expected the number of a token")
    stored = raw.get(CONFIG_KEY)
    if stored is not None:  # saved by us: native, whatever it once was
        family = families.by_name(DiffusionSpec.from_dict(stored, f"{path}/config.json").family)
    else:
        family = families.find(raw, path)
    try:
        if stored is None and family is not None and not family.is_native:
            fields = families.Fields(raw, path, family.name)
            config = AutoConfig.for_model(family.native, **family.config(fields))
            setattr(config, ORIGINAL_KEY, raw)
            classes = _classes(path, family.native, [])
        else:
            kind = raw.get("model_type")
            classes = _classes(path, kind, names, raw.get("is_encoder_decoder"))
            config = CONFIG_MAPPING[kind].from_dict({name: raw[name] for name in raw if name != "auto_map"})
        model_class = classes[type(config)]
    except ModelError:
        raise
    except Exception as error:  # a config with wrong fields raises many types
        raise ModelError(f"{path}: config.json can't be used: {first_line(error)}") from error
    is_decoder = classes is transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if is_decoder and config.get_text_config() is not config:
        raise ModelError(
            f"{path}: {config.model_type} is a model of more than text; expected a language model, such as the one "
            f"inside it ({config.get_text_config().model_type})"
        )
    if is_decoder:
        config = as_bidirectional(config)
        check_layers(path, config)
    return Blueprint(path, raw, family, config, model_class, is_decoder)


def spec_of(blueprint: Blueprint, tokenizer) -> DiffusionSpec:
    """The stored spec, or the one that follows from family, config.json and the prepared tokenizer."""
    stored = blueprint.raw.get(CONFIG_KEY)
    if stored is not None:
        return DiffusionSpec.from_dict(stored, f"{blueprint.path}/config.json")
    if blueprint.family is None:
        return describe(blueprint.raw["model_type"], tokenizer)
    return _family_spec(blueprint.family, blueprint.raw, tokenizer, blueprint.path)


def describe(architecture: str, tokenizer) -> DiffusionSpec:
    """The spec of a model of transformers that has none stored, from its prepared tokenizer."""
    return DiffusionSpec(
        family=architecture,
        mask_token_id=tokenizer.mask_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eot_token_id=end_of_turn_id(tokenizer),
    )


def _family_spec(family: Family, raw: Mapping[str, Any], tokenizer, path: str) -> DiffusionSpec:
    mask = mask_id(tokenizer, family, raw)
    if mask is None and not family.uniform_noise:
        raise ModelError(f"{path}: neither config.json nor the tokenizer names the mask token of this {family.name}")
    eot = tokenizer.get_vocab().get(family.eot_token) if family.eot_token else None
    uses_text = family.eot_text is not None and family.eot_text in (tokenizer.chat_template or "")
    block_size = family.blocks(raw, path)
    return DiffusionSpec(
        family=family.name,
        mask_token_id=mask,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eot_token_id=end_of_turn_id(tokenizer) if eot is None else eot,
        eot_text=family.eot_text if uses_text else None,
        shift_logits=family.shift_logits,
        attention="full" if block_size is None else "block_causal",
        block_size=block_size,
        padding=family.padding_for(raw, path),
        sampler=family.sampler_for(raw, path),
        edit_heads=family.edit_heads,
    )


def as_bidirectional(config):
    """Marks a decoder's config so that transformers builds bidirectional attention for it."""
    config.is_causal = False
    return config


def check_layers(path: str, config) -> None:
    """Makes sure that every layer of a decoder can see a whole canvas.

    Raises:
        ModelError: it has sliding windows, or layers that are no attention.
    """
    limit = getattr(config, "max_position_embeddings", None)
    window = getattr(config, "sliding_window", None) or getattr(config, "attention_chunk_size", None)
    # An architecture that doesn't know layer_types puts its window everywhere, whatever config.json says.
    by_layer = hasattr(type(config)(), "layer_types")
    kinds = set(getattr(config, "layer_types", None) or ()) if by_layer else set()
    windowed = kinds & {"sliding_attention", "chunked_attention"} or (not kinds and window)
    if windowed and window and limit and window >= limit:  # never reached
        kinds -= {"sliding_attention"}
        windowed = False
    if windowed:
        remedy = "every entry of layer_types to full_attention" if kinds else "sliding_window to null"
        raise ModelError(
            f"{path}: {config.model_type} has sliding-window attention (window {window}, context {limit}): a position "
            "would not see the whole canvas. Choose an architecture with full attention, or set "
            f"{remedy} in config.json before you train it as a diffusion model"
        )
    other = sorted(kinds - _BIDIRECTIONAL_LAYERS)
    if other:
        raise ModelError(
            f"{path}: {config.model_type} has layers of the kind {', '.join(other)}, which read text in one direction "
            "only (linear attention, state-space or convolution layers): it can't denoise"
        )


def _classes(path: str, kind: str | None, names: list[str], is_encoder_decoder: bool | None = False) -> Mapping:
    """Config class -> model class: transformers' masked LMs for encoders, its causal LMs for decoders."""
    import transformers
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    if is_encoder_decoder:
        raise ModelError(f"{path}: {kind} is an encoder-decoder; expected an encoder or a decoder")
    if kind == "diffusion_gemma":
        return {transformers.DiffusionGemmaConfig: transformers.DiffusionGemmaForBlockDiffusion}
    causal_named = any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in names)
    if kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not causal_named:
        return transformers.MODEL_FOR_MASKED_LM_MAPPING
    if kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    known = ", ".join(sorted({name for family in families.FAMILIES for name in family.model_types}))
    raise ModelError(
        f"{path}: model_type {kind!r} is neither a published diffusion family ({known}) nor one that transformers has "
        "as a masked or causal language model"
    )
