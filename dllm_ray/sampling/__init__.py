"""Sampling: one step-wise, batched engine for everything that denoises. It knows token ids and a model only."""

from dllm_ray._lazy import exporter

_EXPORTS = {
    "Commit": "dllm_ray.sampling.engine",
    "Engine": "dllm_ray.sampling.engine",
    "SampleOutput": "dllm_ray.sampling.output",
    "Sampler": "dllm_ray.sampling.sampler",
    "SamplerConfig": "dllm_ray.sampling.config",
}
__all__ = ["Commit", "Engine", "SampleOutput", "Sampler", "SamplerConfig"]

__getattr__ = exporter(__name__, _EXPORTS)
