"""LLaDA-MoE 7B-A1B (Base, Instruct): a Qwen3-MoE network with full attention; its router doesn't renormalise."""

from typing import Any

from dllm_ray.models.families.base import Family, Fields
from dllm_ray.models.mapping import experts


def _config(fields: Fields) -> dict[str, Any]:
    fields.require("qk_layernorm", True, default=False, why="Qwen3-MoE always has norms on queries and keys")
    fields.require("shared_expert_intermediate_size", 0, why="Qwen3-MoE has no shared expert")
    fields.require("moe_router_enable_expert_bias", False, why="Qwen3-MoE's router has no expert bias")
    fields.require("partial_rotary_factor", 1, why="Qwen3-MoE rotates whole heads")
    fields.require("clip_qkv", 0, why="Qwen3-MoE doesn't clip queries, keys and values")
    fields.require("hidden_act", "silu", why="the MLP gates with silu")
    layers = fields.need("num_hidden_layers")
    routed = fields.get("moe_layer_freq", [1] * layers)
    if not isinstance(routed, list):
        routed = [routed] * layers
    if len(routed) != layers:
        raise fields.refuse(f"moe_layer_freq has {len(routed)} entries for {layers} layers")
    heads, width = fields.need("num_attention_heads"), fields.need("hidden_size")
    return {
        "vocab_size": fields.need("vocab_size"),
        "hidden_size": width,
        "head_dim": fields.get("head_dim", width // heads),
        # what a checkpoint without dense layers says here is never used
        "intermediate_size": fields.get("dense_intermediate_size", fields.need("expert_intermediate_size")),
        "moe_intermediate_size": fields.need("expert_intermediate_size"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads", heads),
        "num_experts": fields.need("num_experts"),
        "num_experts_per_tok": fields.need("num_experts_per_tok"),
        "mlp_only_layers": [layer for layer, is_routed in enumerate(routed) if not is_routed],
        "decoder_sparse_step": 1,
        "norm_topk_prob": False,
        "rope_parameters": fields.rope(default_theta=10_000.0),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        **fields.take(
            "attention_bias",
            "attention_dropout",
            "bos_token_id",
            "eos_token_id",
            "initializer_range",
            "max_position_embeddings",
            "pad_token_id",
            "rms_norm_eps",
            "router_aux_loss_coef",
        ),
    }


FAMILY = Family(
    name="llada_moe",
    native="qwen3_moe",
    model_types=("lladamoe", "llada"),
    architectures=("LLaDAMoEModelLM", "LLaDAMoEModel"),
    config=_config,
    rules=experts("model.layers.{i}.mlp"),
    mask_token="<|mask|>",
    mask_token_id=156895,
    eot_token="<|role_end|>",
    sampler={"policy": "low_confidence", "block_size": 32},
    lora_targets=("q_proj", "k_proj", "v_proj", "o_proj"),
)
