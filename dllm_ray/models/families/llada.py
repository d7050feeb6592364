"""LLaDA 8B (Base, Instruct) and LLaDA 1.5: a Llama network with full attention, renamed. arXiv 2502.09992"""

from typing import Any

from dllm_ray.models.families.base import Family, Fields
from dllm_ray.models.mapping import Rename

_LAYER = {
    "attn_norm": "input_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_norm": "post_attention_layernorm",
    "ff_proj": "mlp.gate_proj",  # the half that goes through the activation
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}


def _config(fields: Fields) -> dict[str, Any]:
    fields.require("block_type", "llama", default="sequential", why="other blocks fuse the projections")
    fields.require("block_group_size", 1, why="grouped blocks have other tensor names")
    fields.require("activation_type", "silu", default="swiglu", why="the Llama MLP gates with silu")
    fields.require("layer_norm_type", "rms", default="default", why="Llama has RMSNorm")
    fields.require("layer_norm_with_affine", True, why="Llama's norms have weights")
    fields.require("bias_for_layer_norm", False, why="Llama's norms have no bias")
    fields.require("attention_layer_norm", False, why="Llama has no norm on queries and keys")
    fields.require("rope", True, default=False, why="Llama has rotary positions")
    fields.require("alibi", False, why="Llama has rotary positions")
    fields.require("input_emb_norm", False, why="Llama doesn't scale embeddings")
    fields.require("scale_logits", False, why="Llama doesn't scale logits")
    fields.require("include_bias", False, why="the linear layers are mapped without biases")
    fields.require("include_qkv_bias", False, why="the linear layers are mapped without biases")
    heads = fields.need("n_heads")
    width = fields.need("d_model")
    return {
        "vocab_size": fields.get("embedding_size", fields.need("vocab_size")),
        "hidden_size": width,
        "intermediate_size": fields.get("mlp_hidden_size") or fields.need("mlp_ratio") * width,
        "num_hidden_layers": fields.need("n_layers"),
        "num_attention_heads": heads,
        "num_key_value_heads": fields.get("n_kv_heads", 1 if fields.get("multi_query_attention") else heads),
        "max_position_embeddings": fields.need("max_sequence_length"),
        "rms_norm_eps": fields.get("rms_norm_eps", 1e-5),
        "rope_parameters": fields.rope(default_theta=10_000.0),
        "attention_dropout": fields.get("attention_dropout", 0.0),
        "tie_word_embeddings": fields.get("weight_tying", True),
        **fields.take("bos_token_id", "eos_token_id", "pad_token_id"),
    }


TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

FAMILY = Family(
    name="llada",
    native="llama",
    model_types=("llada",),
    architectures=("LLaDAModelLM", "LLaDAModel"),
    config=_config,
    rules=(
        Rename("model.transformer.wte.weight", "model.embed_tokens.weight"),
        *(
            Rename(f"model.transformer.blocks.{{i}}.{theirs}.weight", f"model.layers.{{i}}.{ours}.weight")
            for theirs, ours in _LAYER.items()
        ),
        Rename("model.transformer.ln_f.weight", "model.norm.weight"),
        Rename("model.transformer.ff_out.weight", "lm_head.weight"),
    ),
    vocabulary=("embedding_size", "vocab_size"),
    mask_token="<|mdm_mask|>",
    mask_token_id=126336,
    eot_token="<|eot_id|>",
    chat_template=TEMPLATE,
    replace_template=True,
    sampler={"policy": "low_confidence", "block_size": 32},
)
