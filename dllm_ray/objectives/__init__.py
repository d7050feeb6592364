"""Training objectives: `corrupt` draws the noise, `loss` is deterministic. They know tensors and a model only."""

from dllm_ray._lazy import exporter

_EXPORTS = {
    "BD3LM": "dllm_ray.objectives.bd3lm",
    "EditFlow": "dllm_ray.objectives.edit_flow",
    "LossResult": "dllm_ray.objectives.batch",
    "MDLM": "dllm_ray.objectives.mdlm",
    "MaskedDiffusion": "dllm_ray.objectives.masked",
    "NoisyBatch": "dllm_ray.objectives.batch",
    "Objective": "dllm_ray.objectives.batch",
    "Part": "dllm_ray.objectives.batch",
    "build": "dllm_ray.objectives.registry",
}
__all__ = ["BD3LM", "MDLM", "EditFlow", "LossResult", "MaskedDiffusion", "NoisyBatch", "Objective", "Part", "build"]

__getattr__ = exporter(__name__, _EXPORTS)
