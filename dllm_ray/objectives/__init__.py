"""Training objectives: `corrupt` draws the noise, `loss` is deterministic. They know tensors and a model only."""

from dllm_ray._lazy import exporter

_EXPORTS = {
    "LossResult": "dllm_ray.objectives.mdlm",
    "MDLM": "dllm_ray.objectives.mdlm",
    "NoisyBatch": "dllm_ray.objectives.mdlm",
    "Part": "dllm_ray.objectives.mdlm",
}
__all__ = ["MDLM", "LossResult", "NoisyBatch", "Part"]

__getattr__ = exporter(__name__, _EXPORTS)
