"""Dream 7B (Base, Instruct) and Dream-Coder: a Qwen2 network with full attention, logits shifted. arXiv 2508.15487"""

from typing import Any

from dllm_ray.models.families import qwen
from dllm_ray.models.families.base import Family, Fields


def _config(fields: Fields) -> dict[str, Any]:
    fields.require("use_sliding_window", False, why="Dream sees the whole canvas")
    return qwen.config(fields)


FAMILY = Family(
    name="dream",
    native="qwen2",
    model_types=("Dream", "dream"),
    architectures=("DreamModel", "DreamForCausalLM"),
    config=_config,
    shift_logits=True,
    mask_token="<|mask|>",
    mask_token_id=151666,
    eot_token="<|im_end|>",
    sampler={"block_size": None},
)
