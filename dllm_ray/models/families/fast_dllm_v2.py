"""Fast-dLLM v2 (1.5B, 7B): Qwen2.5 with block-causal attention and shifted logits. arXiv 2509.26328"""

from typing import Any

from dllm_ray.models.families import qwen
from dllm_ray.models.families.base import Family, Fields


def _config(fields: Fields) -> dict[str, Any]:
    fields.require("use_sliding_window", False, why="a window would cut the prompt off")
    return qwen.config(fields)


FAMILY = Family(
    name="fast_dllm_v2",
    native="qwen2",
    model_types=("Fast_dLLM_Qwen",),
    architectures=("Fast_dLLM_QwenForCausalLM",),
    config=_config,
    shift_logits=True,
    attention="block_causal",
    block_field="bd_size",
    block_size=32,
    mask_token="|<MASK>|",
    mask_token_id=151665,
    eot_token="<|im_end|>",
    sampler={"policy": "low_confidence"},
)
