"""Builds a small model from scratch: any encoder or decoder architecture of transformers, with random weights."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from dllm_ray.errors import ModelError, first_line
from dllm_ray.models.blueprint import as_bidirectional, check_layers, describe
from dllm_ray.models.config import ScratchConfig
from dllm_ray.models.lm import DiffusionLM, position_offset
from dllm_ray.models.probe import check_bidirectional
from dllm_ray.models.spec import CONFIG_KEY


def build(config: ScratchConfig, tokenizer, seed: int) -> DiffusionLM:
    """A model with random float32 weights, the same for the same seed.

    Args:
        config: architecture and sizes.
        tokenizer: from `train_bpe`, or any prepared one.
        seed: seeds the weights; torch's global generator is left as it was.

    Raises:
        ModelError: unknown architecture, sizes that don't fit it, or attention that can't be made bidirectional.
    """
    with torch.random.fork_rng(), _sizes_that_fit(config):
        torch.manual_seed(seed)
        model = _create(config, tokenizer)
        spec = describe(config.architecture, tokenizer)
        setattr(model.config, CONFIG_KEY, spec.to_dict())
        lm = DiffusionLM(model.eval(), tokenizer, spec)
        check_bidirectional(lm.model)
    return lm


def check(config: ScratchConfig, tokenizer) -> None:
    """Makes sure that `build` will find its architecture and that the sizes fit it, without making any weights.

    Raises:
        ModelError: they don't.
    """
    with torch.device("meta"), _sizes_that_fit(config):
        _create(config, tokenizer)


@contextmanager
def _sizes_that_fit(config: ScratchConfig) -> Iterator[None]:
    """Every architecture has its own rules for sizes, checked at its own places: all of them become our error."""
    try:
        yield
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(
            f"model.scratch: these sizes and extra don't make a {config.architecture}: {first_line(error)}"
        ) from error


def _create(config: ScratchConfig, tokenizer):
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    )

    kind = config.architecture
    masked = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES
    fits = kind in CONFIG_MAPPING_NAMES and (masked or kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    if not fits or AutoConfig.for_model(kind).is_encoder_decoder:
        raise ModelError(
            f"architecture {kind!r} is not a masked or causal language model of transformers; "
            "try bert, modernbert, llama or qwen3"
        )
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size or 4 * config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings + position_offset(kind, tokenizer.pad_token_id),
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    # These depend on the sizes above, but many architectures default them to those of their published model.
    known = AutoConfig.for_model(kind).to_dict()
    for name in ("cls_token_id", "sep_token_id"):
        if name in known:
            sizes[name] = getattr(tokenizer, name)
    if "num_key_value_heads" in known:
        sizes["num_key_value_heads"] = config.num_attention_heads
    if "head_dim" in known:
        sizes["head_dim"] = config.hidden_size // config.num_attention_heads
    # Dropout off: a diffusion LM sees every text under ever new masks, which regularises by itself, and runs with
    # different numbers of workers stay comparable.
    sizes |= {
        name: 0.0
        for name, value in known.items()
        if name.endswith(("dropout", "dropout_prob", "pdrop")) and isinstance(value, float)
    }
    unknown = sorted(set(config.extra) - set(known))
    if unknown:
        raise ModelError(f"model.scratch.extra: {', '.join(unknown)} is not a field of the {kind} config")
    native = AutoConfig.for_model(kind, **(sizes | config.extra))
    if masked:
        return AutoModelForMaskedLM.from_config(native)
    check_layers("model.scratch", native)
    return AutoModelForCausalLM.from_config(as_bidirectional(native))
