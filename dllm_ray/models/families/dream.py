"""Dream 7B (Base, Instruct) and Dream-Coder: a Qwen2 network with full attention, logits shifted. arXiv 2508.15487"""

from dllm_ray.models.families import qwen
from dllm_ray.models.families.base import Family

FAMILY = Family(
    name="dream",
    native="qwen2",
    model_types=("Dream", "dream"),
    architectures=("DreamModel", "DreamForCausalLM"),
    config=qwen.windowless,
    shift_logits=True,
    mask_token="<|mask|>",
    mask_token_id=151666,
    eot_token="<|im_end|>",
    sampler={"policy": "entropy", "block_size": None},
)
