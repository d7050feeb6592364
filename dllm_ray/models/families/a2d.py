"""Autoregressive models turned into diffusion models by dLLM ("A2D"): Llama, Qwen2 and Qwen3 under other type names.

Their config.json doesn't say whether they were trained with full (MDLM) or block-causal (BD3LM) attention, but their
names do. Under another name, `jobs/convert.py --to bd3lm` states it.
"""

from dllm_ray.models.families import qwen
from dllm_ray.models.families.base import Family


def _family(native: str, architecture: str, eot_token: str) -> Family:
    return Family(
        name=f"a2d-{native}",
        native=native,
        model_types=(f"a2d-{native}",),
        architectures=(architecture,),
        config=qwen.config,
        block_name="bd3lm",
        block_size=32,
        mask_token="<|mask|>",
        eot_token=eot_token,
        thinking_off=True,
    )


FAMILIES = (
    _family("llama", "A2DLlamaLMHeadModel", "<|eot_id|>"),
    _family("qwen2", "A2DQwen2LMHeadModel", "<|im_end|>"),
    _family("qwen3", "A2DQwen3LMHeadModel", "<|im_end|>"),
)
