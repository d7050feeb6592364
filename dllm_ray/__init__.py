"""dllm_ray: train, sample, evaluate and track diffusion language models on Ray."""

from importlib.metadata import PackageNotFoundError, version

from dllm_ray._lazy import exporter

_EXPORTS = {
    "DiffusionLM": "dllm_ray.models.lm",
    "DiffusionSpec": "dllm_ray.models.spec",
    "load": "dllm_ray.models.load",
}
__all__ = ["DiffusionLM", "DiffusionSpec", "load"]

__getattr__ = exporter(__name__, _EXPORTS)

try:
    __version__ = version("dllm-ray")
except PackageNotFoundError:  # a bare checkout, as `ray job submit --working-dir` uploads it
    __version__ = "0+unknown"
