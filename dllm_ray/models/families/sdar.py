"""SDAR (1.7B to 30B-A3B): Qwen3 and Qwen3-MoE networks with block-causal attention. arXiv 2510.06303"""

from typing import Any

from dllm_ray.models.families import qwen
from dllm_ray.models.families.base import Family, Fields
from dllm_ray.models.mapping import Rule, experts


def _config(fields: Fields) -> dict[str, Any]:
    return qwen.windowless(fields, default_theta=1_000_000.0)


def _family(name: str, native: str, architecture: str, rules: tuple[Rule, ...] = ()) -> Family:
    return Family(
        name=name,
        native=native,
        model_types=(name,),
        architectures=(architecture,),
        config=_config,
        rules=rules,
        attention="block_causal",
        block_field="block_size",
        block_size=4,
        mask_token="<|MASK|>",
        mask_token_id=151669,
        eot_token="<|im_end|>",
        sampler={"policy": "low_confidence"},
        padding="block",
    )


FAMILIES = (
    _family("sdar", "qwen3", "SDARForCausalLM"),
    _family("sdar_moe", "qwen3_moe", "SDARMoeForCausalLM", experts("model.layers.{i}.mlp")),
)
