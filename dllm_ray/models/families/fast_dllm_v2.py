"""Fast-dLLM v2 (1.5B, 7B): Qwen2.5 with block-causal attention and shifted logits. arXiv 2509.26328"""

from dllm_ray.models.families import qwen
from dllm_ray.models.families.base import Family

FAMILY = Family(
    name="fast_dllm_v2",
    native="qwen2",
    model_types=("Fast_dLLM_Qwen",),
    architectures=("Fast_dLLM_QwenForCausalLM",),
    config=qwen.windowless,
    shift_logits=True,
    attention="block_causal",
    block_field="bd_size",
    block_size=32,
    mask_token="|<MASK>|",
    mask_token_id=151665,
    eot_token="<|im_end|>",
    sampler={"policy": "low_confidence"},
    padding="block",
)
