"""Fields that Qwen-shaped configs share, for the families that are a Qwen network under another `model_type`."""

from typing import Any

from dllm_ray.models.families.base import Fields

_FIELDS = (
    "attention_bias",
    "attention_dropout",
    "bos_token_id",
    "decoder_sparse_step",
    "eos_token_id",
    "head_dim",
    "hidden_act",
    "hidden_size",
    "initializer_range",
    "intermediate_size",
    "max_position_embeddings",
    "mlp_bias",
    "mlp_only_layers",
    "moe_intermediate_size",
    "norm_topk_prob",
    "num_attention_heads",
    "num_experts",
    "num_experts_per_tok",
    "num_hidden_layers",
    "num_key_value_heads",
    "pad_token_id",
    "rms_norm_eps",
    "vocab_size",
)


def windowless(fields: Fields, default_theta: float = 10_000.0) -> dict[str, Any]:
    """`config` for families whose published config may name a window, and that can't have one."""
    fields.require("use_sliding_window", False, why="a window would cut the prompt off")
    return config(fields, default_theta)


def config(fields: Fields, default_theta: float = 10_000.0) -> dict[str, Any]:
    """Native fields of a Qwen- or Llama-shaped config; any window is left out, as these families never use one."""
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        fields.need(name)
    return {
        "rope_parameters": fields.rope(default_theta),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        "num_key_value_heads": fields.get("num_key_value_heads", fields.need("num_attention_heads")),
        **fields.take(*_FIELDS),
    }
