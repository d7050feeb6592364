"""LLaDA2.0 and LLaDA2.1 (mini, flash): a GLM-4-MoE network with block-causal attention over blocks of 32 tokens.

The two share the network; 2.1 was also trained to edit what it has written.
"""

from typing import Any

from dllm_ray.models.families.base import Family, Fields
from dllm_ray.models.mapping import Fused, Rename, experts


def _config(fields: Fields) -> dict[str, Any]:
    fields.require("use_bias", False, default=True, why="GLM-4-MoE's output projection has no bias")
    fields.require("use_qk_norm", True, why="the norms on queries and keys are mapped")
    fields.require("use_sliding_window", False, why="a window would cut the prompt off")
    fields.require("hidden_act", "silu", why="the MLP gates with silu")
    heads, width = fields.need("num_attention_heads"), fields.need("hidden_size")
    fields.require("score_function", "sigmoid", why="GLM-4-MoE routes by sigmoid scores")
    if fields.get("num_shared_experts", 0) < 1:
        raise fields.refuse("num_shared_experts is 0 or null, and GLM-4-MoE always has a shared expert")
    if fields.need("num_experts_per_tok") < 2:
        raise fields.refuse("num_experts_per_tok is 1, where LLaDA2 doesn't normalise the router's weight")
    partial = fields.get("partial_rotary_factor", 0.5)
    return {
        "vocab_size": fields.need("vocab_size"),
        "hidden_size": width,
        "head_dim": fields.get("head_dim") or width // heads,
        "intermediate_size": fields.need("intermediate_size"),
        "moe_intermediate_size": fields.need("moe_intermediate_size"),
        "num_hidden_layers": fields.need("num_hidden_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("num_key_value_heads") or heads,
        "n_routed_experts": fields.need("num_experts"),
        "n_shared_experts": fields.need("num_shared_experts"),
        "num_experts_per_tok": fields.need("num_experts_per_tok"),
        "n_group": fields.get("n_group", 8),
        "topk_group": fields.get("topk_group", 4),
        "routed_scaling_factor": fields.get("routed_scaling_factor", 2.5),
        "norm_topk_prob": True,
        "first_k_dense_replace": fields.get("first_k_dense_replace", 0),
        "use_qk_norm": True,
        "attention_bias": fields.get("use_qkv_bias", False),
        "partial_rotary_factor": partial,
        "rope_parameters": fields.rope(default_theta=10_000.0, partial=partial),
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "tie_word_embeddings": fields.get("tie_word_embeddings", False),
        **fields.take(
            "attention_dropout",
            "bos_token_id",
            "eos_token_id",
            "initializer_range",
            "max_position_embeddings",
            "pad_token_id",
        ),
    }


_QKV = tuple(f"model.layers.{{i}}.self_attn.{part}_proj" for part in "qkv")

_RULES = (
    Rename("model.word_embeddings.weight", "model.embed_tokens.weight"),
    Fused("model.layers.{i}.attention.query_key_value.weight", tuple(f"{name}.weight" for name in _QKV)),
    Fused("model.layers.{i}.attention.query_key_value.bias", tuple(f"{name}.bias" for name in _QKV)),
    Rename("model.layers.{i}.attention.dense.weight", "model.layers.{i}.self_attn.o_proj.weight"),
    Rename("model.layers.{i}.attention.query_layernorm.weight", "model.layers.{i}.self_attn.q_norm.weight"),
    Rename("model.layers.{i}.attention.key_layernorm.weight", "model.layers.{i}.self_attn.k_norm.weight"),
    Rename("model.layers.{i}.mlp.gate.expert_bias", "model.layers.{i}.mlp.gate.e_score_correction_bias"),
    *experts("model.layers.{i}.mlp"),
)


def _family(name: str, model_types: tuple[str, ...]) -> Family:
    return Family(
        name=name,
        native="glm4_moe",
        model_types=model_types,
        architectures=("LLaDA2MoeModelLM",),
        config=_config,
        rules=_RULES,
        attention="block_causal",
        block_field="block_size",
        block_size=32,
        mask_token="<|mask|>",
        mask_token_id=156895,
        eot_token="<|role_end|>",
        sampler={"policy": name},
        padding="eos_block",
        # routed experts and router stay frozen
        lora_targets=r".*(self_attn\.[qkvo]_proj|mlp\.(shared_experts\.)?(gate|up|down)_proj)",
    )


FAMILIES = (_family("llada2", ("llada2_moe",)), _family("llada21", ("llada21_moe",)))
