"""Settings that were tried, made up."""

from collections.abc import Sequence
from typing import Any

from dllm_ray.config import to_dict
from dllm_ray.sampling.config import SamplerConfig
from dllm_ray.tuning.tried import Tried


def tried(
    name: str,
    scores: Sequence[float],
    tpf: float = 1.0,
    tokens_per_s: float | None = None,
    complete: bool = True,
    nfe: float = 8.0,
    **changes: Any,
) -> Tried:
    """A setting with the scores of documents 0, 1, ...; by default it writes 100 tokens per second and forward."""
    sampler = SamplerConfig(**{"max_new_tokens": 8, "block_size": 8, "steps": 8} | changes)
    speed = 100 * tpf if tokens_per_s is None else tokens_per_s
    named = {f"t/{place}": score for place, score in enumerate(scores)}
    return Tried(name, changes, to_dict(sampler), named, tpf, speed, nfe, complete)
