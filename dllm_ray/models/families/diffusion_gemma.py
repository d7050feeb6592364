"""DiffusionGemma, through the class that transformers ships. It has no mask token: its noise is uniform."""

from dllm_ray.models.families.base import Family

FAMILY = Family(
    name="diffusion_gemma",
    native="diffusion_gemma",
    model_types=("diffusion_gemma",),
    architectures=("DiffusionGemmaForBlockDiffusion",),
    uniform_noise=True,
    sampler={"steps_per_block": 48},
)
